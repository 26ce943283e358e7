"""Means of the loss terms between two reports."""

from __future__ import annotations

import time

import torch
from lightning_fabric import Fabric
from torch import Tensor

from imgshared.types import LossTerms

MEASURE = "measure"  # the loss without its adversarial part, step by step


class Meter:
    """Sums losses on the device, so that a step does not wait for a number."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.steps, self._cells, self._since = 0, 0, time.monotonic()
        self._sums: dict[str, tuple[Tensor, float]] = {}  # sum and its weight: a batch may lack a term

    def add(self, terms: LossTerms, prefix: str = "", weight: float = 1.0) -> None:
        """Add a player's terms, named ``<prefix>loss`` and ``<prefix><part>``; without a prefix also `MEASURE`."""
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
        """Return steps, cells a second and the means over all ranks, and begin anew."""
        values = torch.stack([total for total, _ in self._sums.values()]).tolist() if self._sums else []
        weights = [weight for _, weight in self._sums.values()]
        parts = [dict(zip(self._sums, zip(values, weights, strict=True), strict=True))]
        if fabric.world_size > 1:  # ranks may hold other terms, or no cells at all
            parts *= fabric.world_size
            torch.distributed.all_gather_object(parts, parts[0])
        names = dict.fromkeys(name for part in parts for name in part)
        means = {n: sum(p[n][0] for p in parts if n in p) / sum(p[n][1] for p in parts if n in p) for n in names}
        rate = self._cells / max(time.monotonic() - self._since, 1e-9)
        steps = self.steps
        self.clear()
        return steps, rate, means
