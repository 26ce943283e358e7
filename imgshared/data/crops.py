"""From one image and its label mask to cells: resampling, measuring, cutting crops, and the range of intensities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.transform import resize

TOUCHES, LEAVES, LOST = "nucleus touches the border", "crop leaves the image", "lost in resampling"
BLOCK = 256  # crops that are in memory at a time


@dataclass(frozen=True)
class Cells:
    """The cells of one image, in the order of their labels.

    Parameters
    ----------
    labels
        (n,) label in the mask as the user gave it.
    numbers
        (n,) label in the consecutive mask that the crops are cut from.
    centroids_px
        (n, 2) y and x in pixels of the image they are cut from.
    corners
        (n, 2) first row and column of each crop.
    area_px
        (n,) pixels of the mask.
    dropped
        Why and how many cells are not among them.
    """

    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]
    centroids_px: NDArray[np.float64]
    corners: NDArray[np.int64]
    area_px: NDArray[np.int64]
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.labels)


def consecutive(mask: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number the labels of a (Y, X) mask 1 to n; the second array holds the label that each number stands for."""
    if int(mask.max(initial=0)) > max(mask.size, 2**20):  # a table of all possible labels would be too long
        values, inverse = np.unique(mask, return_inverse=True)
        labels = values[values > 0].astype(np.int64)
        return (inverse.reshape(mask.shape) + (values[0] != 0)).astype(np.int32), labels
    present = np.bincount(mask.ravel()) > 0
    present[0] = False
    table = np.cumsum(present, dtype=np.int32) * present
    return table[mask].astype(np.int32), np.flatnonzero(present)


def resample(image: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Resample (C, Y, X) to another (Y, X), smoothed before it shrinks; the dtype stays, rounded."""
    shrinks = shape[0] < image.shape[1]
    settings = {"order": 1, "mode": "edge", "anti_aliasing": shrinks, "preserve_range": True}
    out = np.stack([resize(plane.astype(np.float32), shape, **settings) for plane in image])
    return out if image.dtype.kind == "f" else np.rint(out).astype(image.dtype)


def resample_labels(mask: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Resample a (Y, X) mask to another shape by the nearest pixel."""
    rows = ((np.arange(shape[0]) + 0.5) * mask.shape[0] / shape[0]).astype(np.int64)
    columns = ((np.arange(shape[1]) + 0.5) * mask.shape[1] / shape[1]).astype(np.int64)
    return np.asarray(mask[rows[:, None], columns])


def find_cells(mask: NDArray[np.int32], labels: NDArray[np.int64], crop_px: int) -> Cells:
    """Return the cells whose crops lie within the image and whose masks do not touch its border.

    Parameters
    ----------
    mask
        (Y, X) consecutive labels, 0 = background.
    labels
        (n,) what the user calls them.
    """
    count = len(labels)
    area = np.bincount(mask.ravel(), minlength=count + 1)[1:]
    y, x = (_weighted(mask, np.arange(side), axis, count) for axis, side in enumerate(mask.shape))
    present = area > 0
    centroids = np.stack([y, x], axis=1) / np.maximum(area, 1)[:, None]
    corners = np.rint(centroids - (crop_px - 1) / 2).astype(np.int64)
    touches = np.zeros(count + 1, bool)
    touches[np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])] = True
    touches = touches[1:] & present
    outside = ((corners < 0) | (corners + crop_px > np.asarray(mask.shape))).any(axis=1)
    keep = present & ~touches & ~outside
    dropped = {TOUCHES: touches, LEAVES: present & ~touches & outside, LOST: ~present}
    return Cells(
        labels=labels[keep],
        numbers=np.flatnonzero(keep) + 1,
        centroids_px=centroids[keep],
        corners=corners[keep],
        area_px=area[keep],
        dropped={reason: int(which.sum()) for reason, which in dropped.items() if which.any()},
    )


def _weighted(mask: NDArray[np.int32], positions: NDArray[Any], axis: int, count: int) -> NDArray[np.float64]:
    weights = np.broadcast_to(positions[:, None] if axis == 0 else positions[None, :], mask.shape)
    return np.bincount(mask.ravel(), weights=weights.ravel(), minlength=count + 1)[1:].astype(np.float64)


def mean_raw(image: NDArray[Any], mask: NDArray[np.int32], cells: Cells) -> NDArray[np.float32]:
    """Return (n, C) mean intensity of each channel in each cell's own mask."""
    sums = [np.bincount(mask.ravel(), weights=plane.ravel())[cells.numbers] for plane in image]
    return (np.stack(sums, axis=1) / cells.area_px[:, None]).astype(np.float32)


def cut(
    image: NDArray[Any], mask: NDArray[np.int32], cells: Cells, crop_px: int, *, mask_neighbours: bool
) -> Iterator[tuple[slice, NDArray[Any], NDArray[np.bool_]]]:
    """Yield blocks of cells: which they are, their crops (b, C, Y, X) and their own masks (b, Y, X)."""
    for start in range(0, len(cells), BLOCK):
        block = slice(start, start + BLOCK)
        windows = [np.s_[y : y + crop_px, x : x + crop_px] for y, x in cells.corners[block]]
        crops = np.stack([image[:, *w] for w in windows])
        around = np.stack([mask[w] for w in windows])
        own = around == cells.numbers[block, None, None]
        if mask_neighbours:
            crops *= (own | (around == 0))[:, None]
        yield block, crops, own


class IntensityRange:
    """Quantiles of a stream of pixels, one set a marker, in memory that does not grow.

    Exact for 8 and 16 bits; float32 falls into bins by its upper 16 bits (non-negative floats sort as their bits do),
    which is good to 0.4 %.
    """

    def __init__(self, markers: int) -> None:
        self._counts = np.zeros((markers, 2**16), np.int64)
        self._least, self._most = np.full(markers, np.inf), np.full(markers, -np.inf)

    def add(self, marker: int, pixels: NDArray[Any]) -> None:
        """Count pixels of a marker, of any shape."""
        bins = np.ascontiguousarray(pixels).ravel()
        bins = (bins + np.float32(0)).view(np.uint32) >> 16 if bins.dtype.kind == "f" else bins  # + 0 turns -0 into 0
        self._counts[marker] += np.bincount(bins, minlength=2**16)
        self._least[marker] = min(self._least[marker], float(pixels.min()))
        self._most[marker] = max(self._most[marker], float(pixels.max()))

    def of(self, marker: int, dtype: np.dtype[Any]) -> dict[str, float]:
        """Return min, max and the percentiles 1, 50 and 99; empty where nothing was counted."""
        if not self._counts[marker].any():
            return {}
        p1, p50, p99 = self.percentiles(marker, dtype, (1, 50, 99))
        return {"min": float(self._least[marker]), "p1": p1, "p50": p50, "p99": p99, "max": float(self._most[marker])}

    def percentiles(self, marker: int, dtype: np.dtype[Any], wanted: Sequence[float]) -> list[float]:
        """Return percentiles, in [0, 100], of a marker of which something was counted."""
        counts = np.cumsum(self._counts[marker])
        bins = [int(np.searchsorted(counts, q / 100 * counts[-1])) for q in wanted]
        values = (np.array(bins, np.uint32) << 16).view(np.float32) if dtype.kind == "f" else np.array(bins)
        return [float(v) for v in np.clip(values, self._least[marker], self._most[marker])]
