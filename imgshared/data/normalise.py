"""Raw intensities to about [0, 1] and back, one affine map of a monotone transform a marker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imgshared.data.store import CellStore
from imgshared.types import InputError

FIT_CELLS = 2000  # cells a marker from which the percentiles are taken
BLOCK = 256  # crops read at a time


@dataclass(frozen=True)
class Normaliser:
    """Per-marker ``(f(raw) - low) / (high - low)`` with f linear, (signed) square root or arcsinh(raw / cofactor).

    Nothing is clipped, so the map is invertible; `high` is a percentile, so a few pixels exceed 1.

    Parameters
    ----------
    transform, cofactor
        f and its only parameter (arcsinh's).
    low, high
        One value a channel, in transformed units.
    """

    transform: Literal["linear", "sqrt", "arcsinh"]
    cofactor: float
    low: tuple[float, ...]
    high: tuple[float, ...]

    def forward(self, raw: Tensor) -> Tensor:
        """Normalise (..., C, Y, X) raw intensities, float32 out."""
        x = raw.to(torch.float32)
        if self.transform == "sqrt":
            x = x.sign() * x.abs().sqrt()  # signed: background-subtracted images have negative pixels
        elif self.transform == "arcsinh":
            x = torch.asinh(x / self.cofactor)
        low, high = self._bounds(x)
        return (x - low) / (high - low)

    def inverse(self, x: Tensor) -> Tensor:
        """Return (..., C, Y, X) raw intensities from normalised ones, float32, not rounded."""
        low, high = self._bounds(x)
        x = x.to(torch.float32) * (high - low) + low
        if self.transform == "sqrt":
            return x * x.abs()
        return torch.sinh(x) * self.cofactor if self.transform == "arcsinh" else x

    def ends(self, channel: int) -> tuple[float, float]:
        """Return the raw intensities of a channel that become 0 and 1."""
        low, high = self.select([channel]).inverse(torch.tensor([0.0, 1.0])[None, None]).flatten().tolist()
        return low, high

    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (
            torch.tensor(v, dtype=torch.float32, device=x.device)[:, None, None] for v in (self.low, self.high)
        )
        return low, high

    def select(self, channels: Sequence[int]) -> Normaliser:
        """Return the normaliser of some channels."""
        low, high = (tuple(v[c] for c in channels) for v in (self.low, self.high))
        return Normaliser(self.transform, self.cofactor, low, high)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Normaliser:
        """Read back what `to_dict` wrote."""
        return Normaliser(data["transform"], data["cofactor"], tuple(data["low"]), tuple(data["high"]))


def fit_normaliser(
    store: CellStore,
    cells: NDArray[np.integer[Any]],
    channels: Sequence[int],
    measured: NDArray[np.bool_] | None = None,
    *,
    transform: Literal["linear", "sqrt", "arcsinh"] = "linear",
    cofactor: float = 5.0,
    low: float = 0.1,
    high: float = 99.9,
    seed: int = 0,
) -> Normaliser:
    """Fit on the pixels of the given (training) cells; at most 2000 cells a marker are read.

    They are drawn once for all markers, so that a marker's bounds do not depend on which others there are.

    Parameters
    ----------
    cells, channels
        Rows and channels of the store.
    measured
        (cells, channels) bool, where to look; None: what the store says.

    Raises
    ------
    InputError
        Where a marker is measured in none of the cells or is constant in them; the message names it and, since no panel
        can go without chromatin, another way out for that. Where `low` is not below `high`.
    """
    if low >= high:
        raise InputError(f"normalise.low = {low:g} must be below normalise.high = {high:g}: both are percentiles")
    measured = store.measured[np.ix_(cells, np.asarray(channels))] if measured is None else measured
    for channel, known in zip(channels, measured.T, strict=True):
        if not known.any():
            raise _unusable(store, channel, "measured in no training cell")
    order = np.random.default_rng(seed).permutation(len(cells))
    chosen = np.zeros_like(measured)
    for k, known in enumerate(measured.T):
        chosen[order[known[order]][:FIT_CELLS], k] = True
    bounds = []
    for channel, pixels in zip(channels, _pixels(store, cells, channels, chosen), strict=True):
        raw = torch.from_numpy(pixels.astype(np.float32))
        x = Normaliser(transform, cofactor, (0.0,), (1.0,)).forward(raw[:, None]).numpy()
        bottom, top = np.percentile(x, [low, high])
        if not top > bottom:
            top = x.max()  # sparse counts: the percentile itself may be background
        if not top > bottom:
            raise _unusable(store, channel, "constant over the training cells")
        bounds.append((float(bottom), float(top)))
    return Normaliser(transform, cofactor, tuple(b for b, _ in bounds), tuple(t for _, t in bounds))


def _pixels(
    store: CellStore, cells: NDArray[np.integer[Any]], channels: Sequence[int], chosen: NDArray[np.bool_]
) -> list[NDArray[Any]]:
    """Crops of each channel, (n, Y, X), of the cells that are `chosen` (cells, channels) for it.

    A crop lies in the store with all its channels, so each cell is read once for all of them.
    """
    found: list[list[NDArray[Any]]] = [[] for _ in channels]
    rows = np.flatnonzero(chosen.any(1))
    rows = rows[np.argsort(cells[rows], kind="stable")]
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        images = store.images(cells[block])
        for k, channel in enumerate(channels):
            found[k].append(images[chosen[block, k], channel])
    return [np.concatenate(parts) for parts in found]


def _unusable(store: CellStore, channel: int, how: str) -> InputError:
    marker, advice = store.panel.markers[channel], "leave it out (markers=...) or change the split"
    if marker == store.panel.chromatin:
        advice = "it is chromatin, which every panel keeps: change the split, or prepare with another chromatin=..."
    return InputError(f"marker {marker!r} is {how}: {advice}")
