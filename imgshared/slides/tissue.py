"""Where a slide shows tissue: what lies outside is glass, which is neither read again nor predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from imgshared.data.readers import open_mask
from imgshared.data.windows import level_shapes, plan_tiles, read_labels
from imgshared.slides.damage import Damage, covered
from imgshared.slides.source import Slide
from imgshared.types import InputError

THUMBNAIL = 2048  # px, the longer side at most
BLOCK = 4096  # px of the level that are read at a time
HELD = 2**26  # px of a mask that is read once; a larger one is read window by window
SMOOTH, GROW = 16.0, 64.0  # px of the slide: from nuclei to tissue, and what belongs to its outermost cells


@dataclass(frozen=True)
class Tissue:
    """A mask of tissue that is coarser than the slide, or as fine.

    Parameters
    ----------
    read
        Reads a window of the mask; not 0 is tissue.
    given, shape
        (y, x) of the mask and (Y, X) of the slide's grid.
    """

    read: Callable[[slice, slice], NDArray[Any]]
    given: tuple[int, int]
    shape: tuple[int, int]

    def within(self, rows: slice, columns: slice) -> NDArray[np.bool_]:
        """Return (rows, columns) bool, by the nearest pixel of the mask."""
        at = [
            ((np.arange(here.start, here.stop) + 0.5) * given / side).astype(np.int64)
            for here, given, side in zip((rows, columns), self.given, self.shape, strict=True)
        ]
        part = self.read(*(slice(int(p[0]), int(p[-1]) + 1) for p in at)) > 0
        return np.asarray(part[(at[0] - at[0][0])[:, None], at[1] - at[1][0]])


def find_tissue(slide: Slide, channel: str, *, skip_damaged: bool = False) -> Tissue:
    """Find tissue by Otsu's threshold on the square root of a smoothed thumbnail of one channel.

    With `skip_damaged` a part of the thumbnail that cannot be read counts as tissue: the slide may be whole there.

    Raises
    ------
    InputError
        Where the channel is constant, or cannot be read.
    """
    small, lost = thumbnail(slide, channel, skip_damaged=skip_damaged)
    factor = max(slide.shape) / max(small.shape)
    small[lost] = small[~lost].min() if not lost.all() else 0
    image = np.sqrt(ndimage.gaussian_filter(small - small.min(), SMOOTH / factor))  # dim tissue is tissue
    if not image.max() > image.min():
        raise InputError(f"{slide.path}: {channel!r} is the same everywhere, so tissue=otsu finds none: leave it out")
    near = ndimage.distance_transform_edt(image <= threshold_otsu(image[~lost])) <= GROW / factor
    near |= lost
    return Tissue(lambda *at: near[at], (small.shape[0], small.shape[1]), slide.shape)


def read_tissue(slide: Slide, path: Path) -> Tissue:
    """Open a mask of tissue, of the size of one of the slide's levels, to be read window by window; not 0 is tissue.

    Raises
    ------
    InputError
        Where it has another size; both are named.
    """
    shape = open_mask(path).shape[1:]
    known = level_shapes(slide.path) if not slide.image.files else [slide.level_shape]
    if shape not in known:
        told = ", ".join(f"{y} x {x}" for y, x in known)
        raise InputError(f"mask {path} is {shape[0]} x {shape[1]} pixels, the levels of {slide.path} are {told}")
    given = shape[0], shape[1]
    if given[0] * given[1] > HELD:
        return Tissue(partial(_window, path), given, slide.shape)
    whole = _window(path, *(slice(0, side) for side in given))
    return Tissue(lambda *at: whole[at], given, slide.shape)


def _window(path: Path, rows: slice, columns: slice) -> NDArray[Any]:
    with read_labels(path) as read:
        return read(rows, columns)


def thumbnail(
    slide: Slide, channel: str, *, skip_damaged: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a small (y, x) picture of a channel, means of squares of the coarsest level that is large enough, and
    where it could not be read."""
    shapes = level_shapes(slide.path) if not slide.image.files else [slide.level_shape]
    level = max([k for k, shape in enumerate(shapes) if max(shape) >= THUMBNAIL], default=0)
    coarse = replace(slide, level=level, shape=shapes[level], level_shape=shapes[level])
    height, width = shapes[level]
    factor = max(1, -(-max(height, width) // THUMBNAIL))
    out = np.zeros((-(-height // factor), -(-width // factor)), np.float32)
    lost, damage = np.zeros(out.shape, bool), Damage(coarse.shape, allowed=skip_damaged)
    with coarse.reader([channel]) as reader:
        read = damage.guard(reader, 1, slide.image.dtype)
        for tile in plan_tiles(coarse.shape, BLOCK // factor * factor):
            pixels = read(*tile)[0]
            unread = covered(damage.blocks, tile)
            y, x = (span.start // factor for span in tile)
            for whole, part in ((out, _means(pixels, factor)), (lost, _means(unread, factor) > 0)):
                whole[y : y + part.shape[0], x : x + part.shape[1]] = part
    return out, lost


def _means(image: NDArray[Any], factor: int) -> NDArray[np.float32]:
    """Means of factor x factor pixels; the last row and column of what is there."""
    starts = [np.arange(0, side, factor) for side in image.shape]
    sums = np.add.reduceat(np.add.reduceat(image, starts[0], 0, dtype=np.float64), starts[1], 1)
    counts = [np.diff([*start.tolist(), side]) for start, side in zip(starts, image.shape, strict=True)]
    return np.asarray(sums / np.outer(*counts), np.float32)
