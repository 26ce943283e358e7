"""Windows of images that are too large to be read whole: any level of a pyramid, any rows and columns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from imgshared.data.ngff import is_ngff, open_ngff
from imgshared.data.planes import Read as Read
from imgshared.data.planes import open_planes
from imgshared.data.readers import PILLOW_SUFFIXES, TIFF_SUFFIXES, ImageFile, native, open_mask, read_planes
from imgshared.data.store import is_store
from imgshared.data.tiff import open_tiff
from imgshared.types import InputError

Span = tuple[slice, slice]


def is_slide(path: Path) -> bool:
    """Say whether a path is an image or a plate of images by its kind, and not a store of cells."""
    if path.is_dir():
        return is_ngff(path) and not is_store(path)
    return path.suffix.lower() in TIFF_SUFFIXES


def level_shapes(path: Path) -> list[tuple[int, int]]:
    """Return (Y, X) of each level of an image's pyramid, finest first; one where it has no pyramid."""
    if is_ngff(path):
        image = open_ngff(path)
        return [_plane(level.shape, image.axes) for level in image.levels]
    if path.suffix.lower() in TIFF_SUFFIXES:
        with open_tiff(path) as tiff:
            return [_plane(level.shape, level.axes.lower()) for level in tiff.series[0].levels]
    raise InputError(f"{path} is no slide: give an OME-TIFF or an OME-Zarr image")


@contextlib.contextmanager
def windows(image: ImageFile, channels: Sequence[str], level: int = 0) -> Iterator[Read]:
    """Open an image, and yield what reads a window (rows, columns) of some channels, (n, Y, X) in the image's dtype.

    Memory and time are bounded by the window where the image is tiled or not compressed; compressed strips are decoded
    over their whole width. A warning names a TIFF in strips or tiles of more than 64 MB.

    Raises
    ------
    InputError
        Where the file is damaged; a window that cannot be read is named.
    """
    places = [image.channels.index(name) for name in channels]
    with contextlib.ExitStack() as stack:
        if image.files:
            parts = [(image.files[c], stack.enter_context(_planes(image.files[c], [0], level))) for c in places]
        else:
            parts = [(image.path, stack.enter_context(_planes(image.path, places, level)))]

        def read(rows: slice, columns: slice) -> NDArray[Any]:
            planes = []
            for path, part in parts:
                try:
                    planes.append(part(rows, columns))
                except Exception as error:  # whatever a codec raises
                    where = f"rows {rows.start} to {rows.stop}, columns {columns.start} to {columns.stop}"
                    raise InputError(f"{path} is damaged at {where} ({error}): copy it again") from error
            return native(np.concatenate(planes))

        problem: BaseException | None = None
        try:
            yield read
        except BaseException as error:  # of the caller: these files are not to blame for it
            problem = error
    if problem is not None:
        raise problem


@contextlib.contextmanager
def read_labels(path: Path) -> Iterator[Callable[[slice, slice], NDArray[np.integer[Any]]]]:
    """Open a label mask, and yield what reads a window of it, (Y, X) integers, 0 = background.

    Raises
    ------
    InputError
        Where it is no label mask; in a window that is damaged or holds negative labels.
    """
    mask = replace(open_mask(path), channels=("label",))

    def labels(rows: slice, columns: slice) -> NDArray[np.integer[Any]]:
        found: NDArray[np.integer[Any]] = read(rows, columns)[0]
        if found.dtype.kind == "i" and found.min() < 0:
            raise InputError(f"{path} holds negative labels: background must be 0 and cells 1, 2, ...")
        return found.astype(np.uint8) if found.dtype.kind == "b" else found

    with windows(mask, mask.channels) as read:
        yield labels


@contextlib.contextmanager
def _planes(path: Path, channels: Sequence[int], level: int) -> Iterator[Read]:
    if is_ngff(path):
        known = open_ngff(path)
        yield lambda rows, columns: known.read(channels, rows, columns, level)
    elif path.suffix.lower() in TIFF_SUFFIXES:
        with open_tiff(path) as tiff, open_planes(tiff, channels, level) as read:
            yield read
    elif path.suffix.lower() in PILLOW_SUFFIXES:  # small enough to be held
        whole = read_planes(path, channels)
        yield lambda rows, columns: whole[:, rows, columns]
    else:
        raise InputError(f"{path} is no slide: give an OME-TIFF or an OME-Zarr image")


def _plane(shape: Sequence[int], axes: str) -> tuple[int, int]:
    sizes = dict(zip(axes, shape, strict=True))
    return sizes["y"], sizes["x"]


def plan_tiles(shape: tuple[int, int], side: int) -> list[Span]:
    """Cut (Y, X) into tiles of `side` px, row by row."""
    height, width = shape
    return [
        (slice(y, min(y + side, height)), slice(x, min(x + side, width)))
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]


def within(part: slice, whole: slice) -> slice:
    """A slice counted from the start of another."""
    return slice(part.start - whole.start, part.stop - whole.start)


class Resampled:
    """Windows of a grid of another pixel size.

    Linear between pixels, smoothed before it shrinks, as `skimage.transform.resize` does for the whole image: every
    window is the same part of that.

    Parameters
    ----------
    read
        Reads windows of an image of shape `given`, (Y, X).
    given, wanted
        Shapes of the image and of the grid.
    """

    def __init__(self, read: Read, given: tuple[int, int], wanted: tuple[int, int]) -> None:
        self.read, self.given = read, given
        self.steps = tuple(g / w for g, w in zip(given, wanted, strict=True))
        self.sigmas = tuple(max(0.0, (step - 1) / 2) for step in self.steps)

    def __call__(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Return (n, Y, X) in the image's dtype; integers are rounded."""
        at, parts = [], []
        for here, step, sigma, side in zip((rows, columns), self.steps, self.sigmas, self.given, strict=True):
            place = (np.arange(here.start, here.stop) + 0.5) * step - 0.5
            margin = int(4 * sigma + 0.5) + 2
            part = slice(max(0, int(place[0]) - margin), min(side, int(place[-1]) + margin + 1))
            at.append(np.clip(place, 0, side - 1) - part.start)
            parts.append(part)
        pixels = self.read(*parts)
        grid = np.meshgrid(*at, indexing="ij")
        out = [ndimage.map_coordinates(self._smooth(plane), grid, order=1, mode="nearest") for plane in pixels]
        whole = np.stack(out)
        return whole if pixels.dtype.kind == "f" else np.rint(whole).astype(pixels.dtype)

    def _smooth(self, plane: NDArray[Any]) -> NDArray[np.float32]:
        plane = plane.astype(np.float32)
        return np.asarray(ndimage.gaussian_filter(plane, self.sigmas, mode="nearest") if any(self.sigmas) else plane)
