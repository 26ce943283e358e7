"""From one image and its labels to cells: resampling, which are kept, cutting crops, and the range of intensities."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.transform import resize

from imgshared.data.scan import SIDE, Labelled, ReadLabels, Scan
from imgshared.data.windows import plan_tiles

TOUCHES, LEAVES, LOST = "nucleus touches the border", "crop leaves the image", "lost in resampling"
BLOCK = 256  # crops that are in memory at a time


@dataclass(frozen=True)
class Cells:
    """The cells of one image, in the order of their labels.

    Parameters
    ----------
    labels
        (n,) label in the mask.
    centroids_px
        (n, 2) y and x in pixels of the image they are cut from.
    corners
        (n, 2) first row and column of each crop.
    area_px
        (n,) pixels of the mask.
    means
        (n, C) mean intensity of each channel in the mask.
    """

    labels: NDArray[np.int64]
    centroids_px: NDArray[np.float64]
    corners: NDArray[np.int64]
    area_px: NDArray[np.int64]
    means: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: NDArray[Any]) -> Cells:
        """Return some of them."""
        return Cells(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def resample(image: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Resample (C, Y, X) to another (Y, X), smoothed before it shrinks; the dtype stays, rounded."""
    shrinks = shape[0] < image.shape[1]
    settings = {"order": 1, "mode": "edge", "anti_aliasing": shrinks, "preserve_range": True}
    out = np.stack([resize(plane.astype(np.float32), shape, **settings) for plane in image])
    return out if image.dtype.kind == "f" else np.rint(out).astype(image.dtype)


def resampled_labels(read: ReadLabels, given: tuple[int, int], shape: tuple[int, int]) -> ReadLabels:
    """Turn what reads windows of labels into what reads them on a grid of another shape, by the nearest pixel."""

    def labels(rows: slice, columns: slice) -> NDArray[Any]:
        at = [
            ((np.arange(span.start, span.stop) + 0.5) * side / wanted).astype(np.int64)
            for span, side, wanted in zip((rows, columns), given, shape, strict=True)
        ]
        part = read(*(slice(int(p[0]), int(p[-1]) + 1) for p in at))
        return np.asarray(part[(at[0] - at[0][0])[:, None], at[1] - at[1][0]])

    return labels


def find_cells(found: Scan, shape: tuple[int, int], crop_px: int, labels: int) -> tuple[Cells, dict[str, int]]:
    """Return the cells whose crops lie within the image and whose masks do not touch its border.

    Parameters
    ----------
    labels
        How many there were before resampling.

    Returns
    -------
    The cells, and why and how many others are not among them.
    """
    table = found.table
    area = table["area"].to_numpy()
    centroids = table[["y", "x"]].to_numpy() / area[:, None]
    corners = np.rint(centroids - (crop_px - 1) / 2).astype(np.int64)
    touches = table["touches"].to_numpy(bool)
    outside = ((corners < 0) | (corners + crop_px > np.asarray(shape))).any(axis=1)
    means = (table.filter(like="sum_").to_numpy() / area[:, None]).astype(np.float32)
    every = Cells(table.index.to_numpy(np.int64), centroids, corners, area.astype(np.int64), means)
    dropped = {TOUCHES: int(touches.sum()), LEAVES: int((outside & ~touches).sum()), LOST: labels - len(table)}
    return every.select(~touches & ~outside), {reason: count for reason, count in dropped.items() if count}


def cut(
    image: Labelled, cells: Cells, crop_px: int, *, mask_neighbours: bool
) -> Iterator[tuple[Cells, NDArray[Any], NDArray[np.bool_]]]:
    """Yield blocks of cells, tile by tile: the cells, their crops (b, C, Y, X) and their own masks (b, Y, X)."""
    for span in plan_tiles(image.shape, SIDE):
        inside = np.ones(len(cells), bool)
        for axis, side in enumerate(span):
            place = cells.centroids_px[:, axis]
            inside &= (place >= side.start) & (place < side.stop)
        here = cells.select(inside)
        if not len(here):
            continue
        first, last = here.corners.min(0), here.corners.max(0) + crop_px
        pixels, labels = (read(*map(slice, first, last)) for read in (image.pixels, image.labels))
        for start in range(0, len(here), BLOCK):
            block = here.select(np.arange(start, min(start + BLOCK, len(here))))
            windows = [np.s_[y : y + crop_px, x : x + crop_px] for y, x in block.corners - first]
            crops = np.stack([pixels[:, *w] for w in windows])
            around = np.stack([labels[w] for w in windows])
            own = around == block.labels[:, None, None]
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
