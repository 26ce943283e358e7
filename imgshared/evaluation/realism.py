"""Are predicted stains, all together, distributed as real ones? KID of their features, beside the floors.

The extractor is `agreement`'s: `features.stain_features` in one frame for all cells, standardised by real training
cells and clipped. A blur or a mean picture may be near each real stain and is unlike all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from imgshared import metrics
from imgshared.data.panel import Panel
from imgshared.evaluation.agreement import Standard
from imgshared.evaluation.collect import LINEAR, MEAN, Part

GUESSES = {"predicted": "predicted", "full": "full", "shared": "shared", LINEAR: "linear", MEAN: "marker_mean"}
LEAST = 50  # cells of a group of which a distance is told: of fewer, chance alone moves it by tenths


def realism(test: Part, trained: Sequence[Part], panel: Panel, groups: ArrayLike) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure how far the features of each guess are from those of the real stains of the same cells.

    Parameters
    ----------
    test
        The judged cells with `features` of real stains and of guesses.
    trained
        Training cells, of one imputer or of several, with `features` of real stains: the scale.
    groups
        (n,) of the judged cells.

    Returns
    -------
    Rows as `fidelity.summarise` has them, of the score ``kid``, with its interval over groups; a row a (marker, group,
    prediction) with the column `kid`, of groups with at least `LEAST` cells. No rows of a marker that no training cell
    shows.
    """
    units, rows, by_group = np.asarray(groups), [], []
    for marker in panel.proteins:
        real, cells = _stained(test, panel, marker, "real")
        known = [shown for part in trained if len(shown := _stained(part, panel, marker, "real")[0])]
        if len(real) < 2 or not known:
            continue
        standard, at = Standard.of(np.concatenate(known)), units[cells]
        names, sizes = np.unique(at, return_counts=True)
        enough = sizes >= LEAST
        for key, prediction in GUESSES.items():
            guess, _ = _stained(test, panel, marker, key)
            if not len(guess):
                continue
            distance = paired_distance(at, standard(real), standard(guess))
            about = {"marker": marker, "prediction": prediction}
            rows.append({**about, "score": "kid", **metrics.estimate(at, distance)._asdict()})
            rows[-1] |= {"cells": len(at), "groups": len(names)}
            each = zip(names[enough], distance(np.eye(len(names))[enough]).tolist(), strict=True)
            by_group += [{**about, "group": name, "kid": kid} for name, kid in each]
    return pd.DataFrame(rows), pd.DataFrame(by_group, columns=["marker", "group", "prediction", "kid"])


def paired_distance(groups: ArrayLike, real: ArrayLike, predicted: ArrayLike) -> metrics.Statistic:
    """Kernel distance of features of the real and the predicted stain of the same cells: (n, D) both.

    `metrics.kernel_distance`, but for the pairs of a cell with itself, which are left out on both sides (Gretton et al.
    2012, eq. 4): real and predicted of one cell are alike as no two cells are, and the fewer cells, the more they would
    draw it below 0. The kernel is the inner product of all products of three features, so their sums by group suffice:
    the time grows with the number of cells, not with its square.
    """
    names, code = np.unique(np.asarray(groups), return_inverse=True)
    x, y = (_lifted(v) for v in (real, predicted))
    parts = [(x[code == g], y[code == g]) for g in range(len(names))]
    itself = sum(weight * (a * b).sum(1) ** 3 for weight, a, b in ((1, x, x), (1, y, y), (-2, x, y)))
    between = np.diag(-np.bincount(code, itself).astype(np.float64))
    for k in range(x.shape[1]):  # the first of the three
        sums = np.stack([_products(a, k) - _products(b, k) for a, b in parts])
        between += sums @ sums.T
    size = np.bincount(code)
    pairs = np.outer(size, size) - np.diag(size)

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        over, under = (((counts @ m) * counts).sum(1) for m in (between, pairs))
        return np.asarray(np.divide(over, under, out=np.full(len(counts), np.nan), where=under > 0))

    return statistic


def _stained(part: Part, panel: Panel, marker: str, key: str) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Features of a marker's (real or guessed) stain in the cells that show it beside chromatin, and these cells."""
    cells = np.flatnonzero(part.measured[:, [panel.index(marker), panel.chromatin_index]].all(1))
    found = part.features.get((marker, key))
    return (np.zeros((0, 0)), cells) if found is None else (found[cells], cells)


def _lifted(features: ArrayLike) -> NDArray[np.float64]:
    """Turn the kernel ``(x.y / D + 1)^3`` into the cube of an inner product."""
    x = np.asarray(features, np.float64)
    return np.column_stack([x / np.sqrt(x.shape[1]), np.ones(len(x))])


def _products(x: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Sum over (n, D) rows the products of column `k` with every two columns: (D^2,)."""
    return (x.T @ (x * x[:, k, None])).ravel()
