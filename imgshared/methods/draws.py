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


def list_stains(visible: Tensor, hidden: Tensor, chromatin: int) -> Stains:
    """List the stains that either of two disjoint (B, C) bool masks marks."""
    order = [chromatin, *(c for c in range(visible.shape[1]) if c != chromatin)]
    first = torch.tensor(order, device=visible.device)
    cells, place = (visible | hidden)[:, first].nonzero(as_tuple=True)
    channels = first[place]
    return Stains(cells, channels, visible[cells, channels])


def at_most(mask: Tensor, limit: int | None) -> Tensor:
    """Keep at most `limit` true values of each row of a (B, C) bool mask, drawn at random; None keeps all."""
    if limit is None:
        return mask.clone()
    draw = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    return mask & (draw.argsort(1, descending=True).argsort(1) < limit)


def show(measured: Tensor, chromatin: int, *, chromatin_only: float, hide: float, proteins: int | None) -> Tensor:
    """Choose what of (B, C) `measured` a method is shown: (B, C) bool, at least one stain of every cell that has any.

    Of the cells with chromatin and another stain a share `chromatin_only` shows chromatin alone. Of all other cells
    each stain is hidden with probability `hide`, and at most so many `proteins` are shown; where nothing would be
    left, one stain drawn at random is.
    """
    draw = torch.rand(measured.shape, device=measured.device)
    visible = measured & (draw >= hide)
    stained = visible[:, chromatin].clone()
    visible[:, chromatin] = False
    visible = at_most(visible, proteins)
    visible[:, chromatin] = stained
    best = draw.masked_fill(~measured, -1.0)
    visible |= (best == best.amax(1, keepdim=True)) & measured & ~visible.any(1, keepdim=True)
    alone = measured[:, chromatin] & (measured.sum(1) > 1)
    alone &= torch.rand(len(measured), device=measured.device) < chromatin_only
    only = torch.zeros_like(measured)
    only[:, chromatin] = True
    return torch.where(alone[:, None], only, visible)


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


def first_of_each(values: Tensor) -> Tensor:
    """(N,) bool: whether a value is the first of its kind in (N,)."""
    return ~(values[:, None] == values).tril(-1).any(1)


def few(rows: Tensor, limit: int | None) -> Tensor:
    """Draw at most `limit` of (N,) rows; all, in order, where there are no more, or for None."""
    if limit is None or len(rows) <= limit:
        return rows
    return rows[torch.randperm(len(rows), device=rows.device)[:limit]]


def some(rows: Tensor, share: float) -> Tensor:
    """Draw a share of (N,) rows, at least one of them where there is any; all, in order, for a share of 1."""
    if share >= 1 or len(rows) < 2:
        return rows
    return rows[torch.randperm(len(rows), device=rows.device)[: max(1, round(share * len(rows)))]]
