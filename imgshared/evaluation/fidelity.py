"""How close predicted stains are to the measured ones, beside the two floors.

Intensity is the mean over the whole crop: a mask of the nucleus would miss a membrane or cytoplasmic protein. Scores
are in normalised units, so that markers compare.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared import metrics
from imgshared.evaluation.floors import Floors
from imgshared.prediction.types import PredictedCells

MOMENTS = ["n", "a", "b", "aa", "bb", "ab"]  # sums over pixels: 1, real, predicted, their squares and product
SCORES = ("pearson", "pearson_pooled", "ssim", "l1", "detail", "intensity_pearson", "intensity_spearman")
FOLD = 1e3  # a cell's detail counts at most so many times too high or too low: its logarithm is averaged
BOUNDS = {"l1": (0.0, np.inf), "detail": (-np.log(FOLD), np.log(FOLD))}  # of a score; the others are correlations
FLOORS = ("linear", "marker_mean")


def compare(
    cells: PredictedCells, markers: tuple[str, ...], chromatin: int, floors: Floors, *, sums_only: bool = False
) -> pd.DataFrame:
    """Score each cell, protein and prediction where the protein was measured.

    With `sums_only` without the scores of pictures and without the linear floor, which cost nearly all of the time.

    Returns
    -------
    One row a (cell, marker, prediction): `position` (row in `cells`), `marker`, `prediction` (a key of `cells.images`,
    ``linear`` or ``marker_mean``), `l1`, `pearson`, `ssim`, `detail` (`metrics.spectral_ratio`), `intensity_real`,
    `intensity_predicted`, and the pixel sums `MOMENTS`.
    """
    tables, score = [], _sums if sums_only else _scores
    for channel, marker in enumerate(markers):
        stained = np.flatnonzero(cells.measured[:, channel] & cells.measured[:, chromatin])
        if channel == chromatin or not len(stained):
            continue
        real = cells.real[stained, channel]
        guesses = {name: images[stained, channel] for name, images in cells.images.items()}
        if floors.known(channel):
            if not sums_only:
                guesses["linear"] = floors.linear(channel, cells.real[stained])
            guesses["marker_mean"] = np.broadcast_to(floors.marker_mean(channel), real.shape)
        tables += [
            pd.DataFrame({"position": stained, "marker": marker, "prediction": name, **score(real, guess)})
            for name, guess in guesses.items()
        ]
    return (
        pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["position", "marker", "prediction"])
    )


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise `compare`'s table, joined with a column `group`: one row a (marker, prediction, score).

    `value` over all cells with its interval over groups (`low`, `high`), then the number of `cells` and `groups`.
    `pearson` (0 of a constant prediction), `ssim`, `l1` are means over cells; `pearson_pooled` takes all cells' pixels
    together, so that differences between cells count; `intensity_*` correlate the mean intensity across cells. `detail`
    is the geometric mean over cells of a ratio, so that twice and half as much weigh alike; a prediction without any
    detail counts as a `FOLD`th, a real stain without any not at all. Its interval is that of the mean logarithm.
    """
    rows = []
    for (marker, prediction), part in table.groupby(["marker", "prediction"], sort=False):
        for score in SCORES:
            value = _estimate(part, score)
            rows.append({"marker": marker, "prediction": prediction, "score": score, **value._asdict()})
            rows[-1] |= {"cells": len(part), "groups": part["group"].nunique()}
    return pd.DataFrame(rows)


def by_group(table: pd.DataFrame) -> pd.DataFrame:
    """One row a (marker, group, prediction) with every score and the number of cells."""
    rows = []
    for (marker, group, prediction), part in table.groupby(["marker", "group", "prediction"], sort=False):
        scores = {score: _estimate(part, score).value for score in SCORES}
        rows.append({"marker": marker, "group": group, "prediction": prediction, "cells": len(part), **scores})
    return (
        pd.DataFrame(rows).sort_values(["marker", "prediction", "group"], ignore_index=True) if rows else pd.DataFrame()
    )


def against_floors(table: pd.DataFrame) -> pd.DataFrame:
    """Gain in mean per-cell Pearson of ``predicted`` over each floor, cell by cell, with its interval over groups.

    One row a marker: `predicted`, and for each floor its value, `gain_<floor>` with `_low` and `_high`. A constant
    prediction has no Pearson; it counts as 0 here, so that a collapsed model cannot hide.
    """
    rows = []
    for marker, part in table.groupby("marker", sort=False):
        scores = part.pivot_table("pearson", "position", "prediction", dropna=False).fillna(0.0)
        groups = part.drop_duplicates("position").set_index("position")["group"].loc[scores.index]
        row: dict[str, Any] = {"marker": marker, "predicted": float(scores["predicted"].mean())}
        for floor in [f for f in FLOORS if f in scores]:
            gain = metrics.estimate(groups, metrics.mean(groups, scores["predicted"] - scores[floor]))
            row |= {floor: float(scores[floor].mean())}
            row |= {f"gain_{floor}": gain.value, f"gain_{floor}_low": gain.low, f"gain_{floor}_high": gain.high}
        rows.append(row)
    return pd.DataFrame(rows)


def _estimate(part: pd.DataFrame, score: str) -> metrics.Estimate:
    """Return one of `SCORES` over the cells of `part` (one marker, one prediction), with its interval over groups."""
    found = metrics.estimate(part["group"], _statistic(part, score), BOUNDS.get(score, metrics.SIGNED))
    return metrics.Estimate(*np.exp(found).tolist()) if score == "detail" else found


def _statistic(part: pd.DataFrame, score: str) -> metrics.Statistic:
    groups = part["group"]
    if score == "detail":
        return metrics.mean(groups, np.log(part["detail"].clip(1 / FOLD, FOLD)))
    if score == "pearson_pooled":
        return metrics.pooled_correlation(groups, part[MOMENTS])
    if score.startswith("intensity"):
        real, predicted = part["intensity_real"], part["intensity_predicted"]
        return metrics.correlation(groups, real, predicted, ranks=score.endswith("spearman"))
    return metrics.mean(groups, part[score])


def _scores(real: NDArray[Any], guess: NDArray[Any]) -> dict[str, Any]:
    return {
        "l1": metrics.l1(real, guess),
        "pearson": np.where(_constant(guess) & ~_constant(real), 0.0, metrics.pearson(real, guess)),
        "ssim": metrics.ssim(real, guess),
        "detail": metrics.spectral_ratio(real, guess),
        **_sums(real, guess),
    }


def _constant(images: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(np.ptp(images.reshape(len(images), -1), axis=1) == 0)


def _sums(real: NDArray[Any], guess: NDArray[Any]) -> dict[str, Any]:
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (real, guess))
    sums = [np.full(len(a), a.shape[1]), a.sum(1), b.sum(1), (a * a).sum(1), (b * b).sum(1), (a * b).sum(1)]
    means = {"intensity_real": a.mean(1), "intensity_predicted": b.mean(1)}
    return means | dict(zip(MOMENTS, sums, strict=True))
