"""How far a run is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Position:
    """How far a run is: everything that decides what the next step does, but the weights."""

    stage: int = 0
    epoch: int = 0
    step: int = 0  # of the epoch, done
    total: int = 0  # steps done in all
    best: float = math.inf
    waited: int = 0  # validations since the best
    smooth: float = math.nan  # exponential mean of the loss without its adversarial terms
    smooth_first: float = math.nan
    smooth_best: float = math.inf
    terms: list[str] = field(default_factory=list)  # that the loss has had so far

    def diverges(self, measure: float, terms: Iterable[str], factor: float) -> bool:
        """Take in the loss (without adversarial terms) of the last steps; say whether its smoothed value ran away.

        That is, whether it exceeds its best by `factor` times the size of the best, or a tenth of the first value where
        that is more. The sum of other terms than before is another measure: it begins anew; so it does after a first
        value of exactly zero, which has no size to compare with.
        """
        if not set(terms) <= set(self.terms):
            self.terms = sorted({*self.terms, *terms})
            self.smooth, self.smooth_first, self.smooth_best = math.nan, math.nan, math.inf
        if math.isnan(self.smooth) or self.smooth_first == 0:
            self.smooth = self.smooth_first = self.smooth_best = measure
        else:
            self.smooth = 0.9 * self.smooth + 0.1 * measure
        size = max(abs(self.smooth_best), 0.1 * abs(self.smooth_first))
        ran_away = self.smooth > self.smooth_best + factor * size
        self.smooth_best = min(self.smooth_best, self.smooth)
        return ran_away
