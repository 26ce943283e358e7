"""The exponential average of the weights, which predicts better and steadier than the last step's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from imgshared.training.statistics import ENDS


class Ema:
    """Averaged parameters and batch statistics of a module (Polyak & Juditsky 1992); other buffers stay as they are.

    Parameters
    ----------
    module
        Whose parameters are averaged.
    decay
        Of a step, in (0, 1). Early on it is less, ``(1 + steps) / (10 + steps)``, so that the start is soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live: dict[str, Tensor] = dict(module.named_parameters())
        self._live |= {name: b for name, b in module.named_buffers() if name.endswith(ENDS)}
        self.values = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Move the average towards the weights, after so many steps of the stage: what it trains was at rest before."""
        if not self.values:
            return  # a closed form has nothing to average
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self._live.values()], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the module's place for the time of a `with` block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self._live.items():
            kept = p.detach().clone()
            p.copy_(self.values[name])
            self.values[name].copy_(kept)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take up a saved average."""
        for name, value in values.items():
            self.values[name].copy_(value)
