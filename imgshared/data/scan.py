"""An image of any size and its labels, looked at tile by tile: which cells there are, their means, their picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from imgshared.data.readers import ImageFile
from imgshared.data.windows import Read, Span, plan_tiles
from imgshared.types import InputError

SIDE = 2048  # px of the image that are in memory at a time
BINARY_PX = 2**27  # of a binary mask whose connected parts are cells
ReadLabels = Callable[[slice, slice], NDArray[np.integer[Any]]]


@dataclass(frozen=True)
class Labelled:
    """What reads windows of an image, (C, y, x), and of its labels, (y, x), on one grid of `shape` (Y, X)."""

    pixels: Read
    labels: ReadLabels
    shape: tuple[int, int]


class Watched:
    """Reads windows of a file as `read` does, refuses what is no intensity, and remembers each channel's extremes.

    Parameters
    ----------
    file, names
        The image and the channels that `read` reads.
    """

    def __init__(self, file: ImageFile, names: Sequence[str], read: Read) -> None:
        self._file, self._names, self._read = file, names, read
        self.least, self.most = np.full(len(names), np.inf), np.full(len(names), -np.inf)

    def __call__(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Read a window of the file's own pixels, (C, y, x)."""
        pixels = self._file.checked(self._names, self._read(rows, columns))
        self.least = np.minimum(self.least, pixels.min((1, 2)))
        self.most = np.maximum(self.most, pixels.max((1, 2)))
        return pixels


@dataclass(frozen=True)
class Scan:
    """What a whole image shows.

    Parameters
    ----------
    table
        A row a label: `area`, sums of `y` and `x`, and `sum_<channel>`, of its pixels; whether it `touches` the border.
    picture, outlined
        Every `stride`-th pixel of one channel, and of the labels.
    """

    table: pd.DataFrame
    picture: NDArray[Any]
    outlined: NDArray[np.integer[Any]]


def scan(image: Labelled, channel: int, stride: int) -> Scan:
    """Look at all of an image, one tile in memory at a time; `channel` is that of the picture."""
    parts, touching = list[pd.DataFrame](), set[int]()
    small = [-(-side // stride) for side in image.shape]
    picture, outlined = np.zeros(0), np.zeros(small, np.int64)
    for rows, columns in plan_tiles(image.shape, SIDE):
        pixels, labels = image.pixels(rows, columns), image.labels(rows, columns)
        parts.append(label_sums((rows, columns), labels, pixels))
        touching |= _on_border(labels, rows, columns, image.shape)
        picture = picture if picture.size else np.zeros(small, pixels.dtype)
        first = [-span.start % stride for span in (rows, columns)]
        y, x = ((span.start + f) // stride for span, f in zip((rows, columns), first, strict=True))
        for whole, part in ((picture, pixels[channel]), (outlined, labels)):
            some = part[first[0] :: stride, first[1] :: stride]
            whole[y : y + some.shape[0], x : x + some.shape[1]] = some
    table = pd.concat(parts).groupby(level=0).sum()
    table["touches"] = table.index.isin(touching)
    return Scan(table, picture, outlined)


def labels_in(read: ReadLabels, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Return the labels of a whole mask, ascending, without 0."""
    found = [np.unique(read(*tile)) for tile in plan_tiles(shape, SIDE)]
    labels = np.unique(np.concatenate(found).astype(np.int64))
    return labels[labels > 0]


def connected(read: ReadLabels, shape: tuple[int, int], path: Path) -> tuple[NDArray[np.int32], int]:
    """Number the connected parts of the mask at `path`; return them, (Y, X), and how many there are.

    Raises
    ------
    InputError
        Where the mask is too large to be held.
    """
    if shape[0] * shape[1] > BINARY_PX:
        raise InputError(
            f"{path} holds one label alone: number its cells, which is not done here for a mask of this size"
        )
    parts, count = ndimage.label(read(slice(0, shape[0]), slice(0, shape[1])))
    return parts.astype(np.int32), count


def label_sums(span: Span, labels: NDArray[np.integer[Any]], planes: Iterable[NDArray[Any]]) -> pd.DataFrame:
    """Return a row a label of a window (y, x): `area`, sums of `y` and `x`, and ``sum_<k>`` of each plane, float64."""
    y, x = labels.nonzero()
    values, place = np.unique(labels[y, x], return_inverse=True)
    columns = {"area": None, "y": y + span[0].start, "x": x + span[1].start}
    columns |= {f"sum_{k}": plane[y, x] for k, plane in enumerate(planes)}
    sums = {name: np.bincount(place, weights=of, minlength=len(values)) for name, of in columns.items()}
    return pd.DataFrame(sums, index=pd.Index(values.astype(np.int64), name="label"))


def _on_border(labels: NDArray[Any], rows: slice, columns: slice, shape: tuple[int, int]) -> set[int]:
    """Labels of a tile that lie on the border of the image."""
    edges = [
        (rows.start == 0, labels[0]),
        (rows.stop == shape[0], labels[-1]),
        (columns.start == 0, labels[:, 0]),
        (columns.stop == shape[1], labels[:, -1]),
    ]
    return {int(v) for here, edge in edges if here for v in np.unique(edge)} - {0}
