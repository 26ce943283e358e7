"""Means of the loss terms between two reports, and over an epoch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch
from lightning_fabric import Fabric
from torch import Tensor

from imgshared.types import LossTerms

MEASURE = "measure"  # the loss without its adversarial part, step by step

Sums = dict[str, tuple[float, float]]  # of each term the sum and its weight


class Meter:
    """Sums losses on the device, so that a step does not wait for a number."""

    def __init__(self) -> None:
        self._clear()
        self._whole: Sums = {}

    def _clear(self) -> None:
        self.steps, self._cells, self._since = 0, 0, time.monotonic()
        self._sums: dict[str, tuple[Tensor, float]] = {}  # sum and its weight: a batch may lack a term

    def add(self, terms: LossTerms, prefix: str = "", weight: float = 1.0) -> None:
        """Add a player's terms, named ``<prefix>loss`` and ``<prefix><part>``; without a prefix also `MEASURE`.

        Nothing is added of a batch in which nothing could be judged (its count is 0): its loss of 0 is no success.
        """
        if terms.count == 0:
            return
        values = {"loss": terms.total.detach(), **terms.parts}
        if not prefix:  # what a watcher of divergence may look at: without the moves of the game
            values[MEASURE] = values["loss"] - values.get("adversarial", 0.0)
        for name, value in values.items():
            total, weights = self._sums.get(prefix + name, (torch.zeros_like(value), 0.0))
            self._sums[prefix + name] = (total + value.float() * weight, weights + weight)

    def step(self, cells: int) -> None:
        """Count a step of so many cells."""
        self.steps, self._cells = self.steps + 1, self._cells + cells

    def take(self, fabric: Fabric) -> tuple[int, float, dict[str, float]]:
        """Return steps, cells a second and the means over all ranks, and begin anew; the same on every rank."""
        values = torch.stack([total for total, _ in self._sums.values()]).tolist() if self._sums else []
        weights = [weight for _, weight in self._sums.values()]
        parts: list[Sums] = [dict(zip(self._sums, zip(values, weights, strict=True), strict=True))]
        if fabric.world_size > 1:  # ranks may hold other terms, or no cells at all
            parts *= fabric.world_size
            torch.distributed.all_gather_object(parts, parts[0])
        sums = _added(parts)
        self._whole = _added([self._whole, sums])
        rate = self._cells / max(time.monotonic() - self._since, 1e-9)
        steps = self.steps
        self._clear()
        return steps, rate, _means(sums)

    def take_whole(self) -> dict[str, float]:
        """Return the means of all that `take` has returned since this was last asked, without `MEASURE`."""
        means, self._whole = _means(self._whole), {}
        means.pop(MEASURE, None)
        return means


def _added(parts: Iterable[Sums]) -> Sums:
    out: Sums = {}
    for part in parts:
        for name, (value, weight) in part.items():
            before = out.get(name, (0.0, 0.0))
            out[name] = (before[0] + value, before[1] + weight)
    return out


def _means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {name: value / weight for name, (value, weight) in sums.items()}
