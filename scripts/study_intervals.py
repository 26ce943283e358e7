"""How often does a 95% interval hold the truth? The jackknife of `imgshared.metrics` beside a bootstrap of groups.

    python scripts/study_intervals.py [--repeats 1000] [--groups 3 5 8 16] [--record JSON]

Each repeat draws groups with effects of their own and 60 cells each: the mean of a value, a correlation, R2, an AUROC
(both classes in every group, or one a group), the gap between two AUROCs of the same cells, Cohen's kappa, Cohen's d.
The truth is the score over very many groups.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown, record
from numpy.typing import NDArray

from imgshared import metrics

CELLS = 60  # a group
MANY = 400  # groups of a world that stands for the truth
DRAWS = 500  # of the bootstrap

World = tuple[NDArray[np.intp], metrics.Statistic]


def mean(rng: np.random.Generator, count: int) -> World:
    """Mean of a value."""
    g = np.repeat(np.arange(count), CELLS)
    return g, metrics.mean(g, rng.normal(0, 0.5, count)[g] + rng.normal(size=len(g)))


def correlation(rng: np.random.Generator, count: int) -> World:
    """Correlation of two values, with a slope of each group's own."""
    g = np.repeat(np.arange(count), CELLS)
    a = rng.normal(0, 0.3, count)[g] + rng.normal(size=len(g))
    slope = rng.normal(0.8, 0.2, count)[g]
    return g, metrics.correlation(g, a, slope * a + rng.normal(0, 0.3, count)[g] + rng.normal(size=len(g)))


def auroc(rng: np.random.Generator, count: int) -> World:
    """AUROC of a score, with an effect of each group's own."""
    g = np.repeat(np.arange(count), CELLS)
    truth = rng.integers(0, 2, len(g))
    return g, _auroc(rng, g, truth, 1.2, 0.4, rng.normal(0, 0.3, count)[g])


def auroc_of_groups(rng: np.random.Generator, count: int) -> World:
    """AUROC of a score where a group is of one class: groups of the two in turn."""
    g = np.repeat(np.arange(count), CELLS)
    return g, _auroc(rng, g, g % 2, 1.2, 0.4, rng.normal(0, 0.3, count)[g])


def r2(rng: np.random.Generator, count: int) -> World:
    """R2 of a prediction whose slope and offset are each group's own."""
    g = np.repeat(np.arange(count), CELLS)
    a = rng.normal(0, 0.3, count)[g] + rng.normal(size=len(g))
    predicted = rng.normal(0.8, 0.1, count)[g] * a + rng.normal(0, 0.2, count)[g] + rng.normal(0, 0.4, len(g))
    return g, metrics.r2(g, a, predicted)


def kappa(rng: np.random.Generator, count: int) -> World:
    """Cohen's kappa of two answers that agree more often in some groups than in others."""
    g = np.repeat(np.arange(count), CELLS)
    one = (rng.random(len(g)) < rng.beta(6, 4, count)[g]).astype(np.intp)
    same = rng.random(len(g)) < rng.beta(8, 2, count)[g]
    return g, metrics.kappa(g, one, np.where(same, one, 1 - one))


def gap(rng: np.random.Generator, count: int) -> World:
    """AUROC of one score minus that of another, of the same cells."""
    g = np.repeat(np.arange(count), CELLS)
    truth, shift = rng.integers(0, 2, len(g)), rng.normal(0, 0.3, count)[g]
    a, b = (_auroc(rng, g, truth, effect, 0.3, shift) for effect in (1.2, 1.0))
    return g, lambda counts: a(counts) - b(counts)


def effect(rng: np.random.Generator, count: int) -> World:
    """Cohen's d between two conditions in every group."""
    g = np.repeat(np.arange(count), CELLS)
    positive = rng.integers(0, 2, len(g)).astype(bool)
    values = rng.normal(0.5, 0.2, count)[g] * positive + rng.normal(0, 0.3, count)[g] + rng.normal(size=len(g))
    return g, metrics.effect_size(g, positive, values)


def _auroc(
    rng: np.random.Generator, g: NDArray[np.intp], truth: NDArray[Any], size: float, spread: float, shift: NDArray[Any]
) -> metrics.Statistic:
    score = rng.normal(size, spread, g.max() + 1)[g] * truth + shift + rng.normal(size=len(g))
    return metrics.auroc(g, truth, np.column_stack([-score, score]))


WORLDS: dict[str, Callable[[np.random.Generator, int], World]] = {
    "mean": mean, "correlation": correlation, "R2": r2, "AUROC": auroc, "AUROC, a class a group": auroc_of_groups,
    "gap of AUROC": gap, "kappa": kappa, "Cohen's d": effect,
}  # fmt: skip


def bootstrap(groups: NDArray[np.intp], statistic: metrics.Statistic, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile bootstrap of whole groups (Efron 1979), for comparison."""
    count = len(np.unique(groups))
    values = statistic(rng.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    """Count, record, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--groups", type=int, nargs="+", default=[3, 5, 8, 16])
    parser.add_argument("--record", type=Path, default=Path("intervals.json"))
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = []
    for name, world in WORLDS.items():
        truth = float(np.mean([world(rng, MANY)[1](np.ones((1, MANY)))[0] for _ in range(20)]))
        for count in a.groups:
            held = np.zeros(2)
            for _ in range(a.repeats):
                groups, statistic = world(rng, count)
                ours, theirs = metrics.estimate(groups, statistic)[1:], bootstrap(groups, statistic, rng)
                held += [low <= truth <= high for low, high in (ours, theirs)]
            share = held / a.repeats
            rows.append({"score": name, "groups": count, "jackknife": share[0], "bootstrap": share[1]})
    record(a.record, {"repeats": a.repeats, "cells a group": CELLS, "rows": rows})
    print(markdown(rows))


if __name__ == "__main__":
    main()
