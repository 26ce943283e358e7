"""Random choices of a training step: which stains of which cells, what is hidden, what is translated to what."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Stains(NamedTuple):
    """Single stains of a batch, cell by cell, chromatin before the proteins of a cell.

    Parameters
    ----------
    cells, channels
        (P,) int64: stain p is channel ``channels[p]`` of cell ``cells[p]``.
    visible
        (P,) bool, whether the method is shown it; otherwise it is to be predicted.
    """

    cells: Tensor
    channels: Tensor
    visible: Tensor

    def mask(self, cells: int, markers: int, keep: Tensor) -> Tensor:
        """Return (B, C) bool, true for the stains that `keep` (P,) marks."""
        out = torch.zeros(cells, markers, dtype=torch.bool, device=self.cells.device)
        out[self.cells[keep], self.channels[keep]] = True
        return out

    def first_visible(self, cells: int) -> Tensor:
        """Return, for each cell, the position of its first visible stain; every cell has one."""
        positions = torch.arange(len(self.cells), device=self.cells.device)
        last = torch.full((cells,), len(positions), device=positions.device)
        return last.scatter_reduce(0, self.cells[self.visible], positions[self.visible], "amin")

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return the positions of each cell's first stain and of one other drawn at random, for cells that have two."""
        count = torch.bincount(self.cells)
        first = (count.cumsum(0) - count)[count > 1]
        others = count[count > 1] - 1
        return first, first + 1 + (torch.rand(len(first), device=first.device) * others).long()


def draw_stains(measured: Tensor, chromatin: int, proteins_per_cell: int | None) -> Stains:
    """List the stains of (B, C) `measured`; of each cell's proteins at most so many, drawn at random. All visible."""
    keep = measured
    if proteins_per_cell is not None:
        order = torch.rand(measured.shape, device=measured.device).masked_fill(~measured, -1.0)
        order[:, chromatin] = -1.0
        rank = order.argsort(1, descending=True).argsort(1)
        keep = measured & (rank < proteins_per_cell)
        keep[:, chromatin] = measured[:, chromatin]
    first = torch.tensor([chromatin, *(c for c in range(measured.shape[1]) if c != chromatin)], device=measured.device)
    cells, place = keep[:, first].nonzero(as_tuple=True)
    return Stains(cells, first[place], torch.ones_like(cells, dtype=torch.bool))


def hide(stains: Stains, cells: int, chromatin: int, chromatin_only: float, share: float) -> Tensor:
    """Choose what is visible: (P,) bool with at least one stain of every cell that has any.

    Of the cells with chromatin and another stain a share `chromatin_only` shows chromatin alone; of all other cells
    each stain is hidden with probability `share`, and where that would hide them all, one drawn at random stays.
    """
    device = stains.cells.device
    draw = torch.rand(len(stains.cells), device=device)
    is_chromatin = stains.channels == chromatin
    count = torch.bincount(stains.cells, minlength=cells)
    has = torch.zeros(cells, dtype=torch.bool, device=device)
    has[stains.cells[is_chromatin]] = True
    alone = (has & (count > 1) & (torch.rand(cells, device=device) < chromatin_only))[stains.cells]
    visible = torch.where(alone, is_chromatin, draw >= share)
    best = torch.full((cells,), -1.0, device=device).scatter_reduce(0, stains.cells, draw, "amax")
    shown = torch.zeros(cells, dtype=torch.bool, device=device)
    shown[stains.cells[visible]] = True
    return visible | (~shown[stains.cells] & (draw == best[stains.cells]))


def draw_targets(measured: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """For each cell draw a stain that it does not show and some cell of the batch has.

    Parameters
    ----------
    measured, shown
        (B, C) bool: what is measured, and what of it the method is shown.

    Returns
    -------
    (Q,) cells and (Q,) channels, for the cells that show something and have such a stain.
    """
    possible = measured.any(0) & ~shown & shown.any(1, keepdim=True)
    draw = torch.rand(possible.shape, device=possible.device).masked_fill(~possible, -1.0)
    cells = possible.any(1).nonzero()[:, 0]
    return cells, draw[cells].argmax(1)


def rows_showing(measured: Tensor, channels: Tensor) -> Tensor:
    """For each of (Q,) channels draw a cell that (B, C) `measured` has it in; there must be one."""
    return torch.multinomial(measured[:, channels].T.float(), 1)[:, 0]
