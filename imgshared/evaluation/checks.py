"""Hallucination: objects that one picture has and the other lacks, and whether the source matters.

An object is a connected bright region: pixels above Otsu's threshold of the marker's real training cells, after a light
blur. One threshold a marker, for real and predicted stains alike: a prediction's own would find objects in any blur.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from imgshared import metrics
from imgshared.data.features import blur
from imgshared.prediction.types import PredictedCells

Floats = NDArray[np.float32]
SMOOTH = 1.0  # px, Gaussian before the threshold
SMALLEST = 4  # px, of an object
OVERLAP = 0.5  # share of an object that must lie in objects of the other picture
PIXELS = 64  # of each training crop that the threshold is taken from
BOUNDS = {"found": metrics.SHARE, "invented": metrics.SHARE, "own": (-2.0, 2.0)}  # of a score; the others: 0 and up
COLUMNS = ("objects", "found", "drawn", "invented", "own", "moved", "moves")


class Bright:
    """The threshold of each marker, from blocks of training cells."""

    def __init__(self, channels: int, seed: int = 0) -> None:
        self._pixels: list[list[Floats]] = [[] for _ in range(channels)]
        self._rng = np.random.default_rng(seed)

    def add(self, images: Floats, measured: NDArray[np.bool_]) -> None:
        """Take in (n, C, Y, X) training crops and which markers were measured, (n, C)."""
        size = images.shape[2] * images.shape[3]
        for channel, known in enumerate(measured.T):
            if known.any():
                smooth = blur(images[known, channel], SMOOTH).reshape(-1, size)
                at = self._rng.integers(0, size, (len(smooth), min(PIXELS, size)))
                self._pixels[channel].append(np.take_along_axis(smooth, at, 1).ravel())

    def threshold(self, channel: int) -> float:
        """Return the marker's threshold; NaN where no training cell had it, or it does not vary."""
        pixels = np.concatenate(self._pixels[channel]) if self._pixels[channel] else np.zeros(1)
        return float(threshold_otsu(pixels)) if float(np.ptp(pixels)) > 1e-6 else float("nan")


@dataclass
class Maps:
    """Sums over cells of one marker, (Y, X) each, about the nucleus's centre.

    Parameters
    ----------
    cells
        How many.
    real, predicted
        Their pictures.
    missed, invented
        Cells in which the pixel belongs to a real object that the prediction has not, and the reverse.
    """

    cells: int
    real: NDArray[np.float64]
    predicted: NDArray[np.float64]
    missed: NDArray[np.float64]
    invented: NDArray[np.float64]

    def __add__(self, other: Maps) -> Maps:
        """Sum over more cells."""
        return Maps(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def objects(images: Floats, threshold: float) -> NDArray[np.int32]:
    """Label the bright regions of (n, Y, X) images: 0 for none, numbers run on over all images."""
    bright = blur(np.asarray(images, np.float32), SMOOTH) > threshold
    plane = np.zeros((3, 3, 3), bool)
    plane[1] = True  # regions never reach from one cell's picture into the next
    labels, count = ndimage.label(bright, plane)
    small = np.bincount(labels.ravel(), minlength=count + 1) < SMALLEST
    kept = np.where(small, 0, np.cumsum(~small) - (not small[0]))
    kept[0] = 0
    return np.asarray(kept[labels], np.int32)


def unmatched(labels: NDArray[np.int32], other: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which objects (by label, the first entry is the background's) the other picture has not."""
    count = int(labels.max()) + 1
    size = np.bincount(labels.ravel(), minlength=count)
    inside = np.bincount(labels.ravel(), (other > 0).ravel(), minlength=count)
    lone = np.asarray(inside < OVERLAP * np.maximum(size, 1))
    lone[0] = False
    return lone


def check(
    done: PredictedCells, markers: tuple[str, ...], chromatin: int, bright: Bright, seed: int = 0
) -> Iterator[tuple[pd.DataFrame, Maps]]:
    """Yield, marker by marker, a row a cell and the maps.

    Columns: `position` (row in `done`), `marker`, `objects` of the real stain and how many the prediction has again
    (`found`), objects `drawn` by the prediction and how many the real stain has not (`invented`), `own` (Pearson r with
    the cell's own prediction minus r with another cell's: its source shuffled), `moved` and `moves` (mean absolute
    difference between its prediction and the other cell's, between their real stains).
    """
    for channel, marker in enumerate(markers):
        stained = np.flatnonzero(done.measured[:, channel] & done.measured[:, chromatin])
        threshold = bright.threshold(channel)
        if channel == chromatin or len(stained) < 2 or np.isnan(threshold):
            continue
        real, guess = done.real[stained, channel], done.images["predicted"][stained, channel]
        ours, theirs = objects(real, threshold), objects(guess, threshold)
        missed, invented = unmatched(ours, theirs), unmatched(theirs, ours)
        n = len(stained)
        ring = np.random.default_rng(seed).permutation(n)
        other = np.empty_like(ring)
        other[ring] = np.roll(ring, 1)  # nobody is paired with itself
        counts = [_each(ours, n), _each(ours, n, ~missed), _each(theirs, n), _each(theirs, n, invented)]
        r = [np.nan_to_num(metrics.pearson(real, x)) for x in (guess, guess[other])]
        gaps = [np.abs(x - x[other]).mean((1, 2)) for x in (guess, real)]
        values = [*counts, r[0] - r[1], *gaps]
        maps = Maps(n, *(x.sum(0, np.float64) for x in (real, guess, missed[ours], invented[theirs])))
        yield pd.DataFrame({"position": stained, "marker": marker, **dict(zip(COLUMNS, values, strict=True))}), maps


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise `check`'s rows, joined with a column `group`.

    Returns
    -------
    One row a marker x score with `value`, `low`, `high` over groups, `cells`: ``found``, the share of real objects that
    the prediction has; ``invented``, the share of its objects that the real stain has not; ``objects``, real ones a
    cell; ``own``, the mean of that column: 0 where the prediction fits any cell as well; ``moves``, how much
    predictions differ between cells over how much real stains do.
    """
    rows = []
    for marker, part in table.groupby("marker", sort=False) if len(table) else ():
        groups = part["group"]
        scores: dict[str, metrics.Statistic] = {
            "objects": metrics.mean(groups, part["objects"]),
            "found": metrics.ratio(groups, part["found"], part["objects"]),
            "invented": metrics.ratio(groups, part["invented"], part["drawn"]),
            "own": metrics.mean(groups, part["own"]),
            "moves": metrics.ratio(groups, part["moved"], part["moves"]),
        }
        for name, statistic in scores.items():
            value = metrics.estimate(groups, statistic, BOUNDS.get(name, (0.0, np.inf)))
            rows.append({"marker": marker, "score": name, **value._asdict(), "cells": len(part)})
    return pd.DataFrame(rows)


def _each(labels: NDArray[np.int32], cells: int, wanted: NDArray[np.bool_] | None = None) -> NDArray[Any]:
    """Count the (wanted) objects of each cell."""
    _, first = np.unique(labels, return_index=True)
    names = labels.ravel()[first]
    chosen = (names > 0) if wanted is None else (names > 0) & wanted[names]
    return np.bincount(first[chosen] // labels[0].size, minlength=cells)
