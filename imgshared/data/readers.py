"""Open microscope images by their headers, read the pixels later: TIFF, OME-TIFF, OME-Zarr, and one file a channel.

Axes of everything that is read are `CYX`. Only unsigned 8 and 16 bit and 32-bit float are taken: these hold raw
intensities, and nothing is rescaled silently.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from imgshared.data.ngff import is_ngff, open_ngff
from imgshared.data.planes import open_planes
from imgshared.data.tiff import names_and_pixel_size, open_tiff, other_files, shape_of
from imgshared.types import InputError

DTYPES = ("uint8", "uint16", "float32")
TIFF_SUFFIXES, PILLOW_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8"), (".png",)
SUFFIXES = (".ome.tiff", ".ome.tif", ".ome.btf", ".ome.zarr", ".zarr", *TIFF_SUFFIXES, *PILLOW_SUFFIXES)


@dataclass(frozen=True)
class ImageFile:
    """An image known by its header.

    Parameters
    ----------
    path
        The file, or the folder of single-channel files.
    channels
        Channel names in the file's order; empty where the file does not tell them.
    shape
        (C, Y, X).
    dtype
        Of the pixels.
    pixel_size_um
        Micrometres a pixel, None where the file does not say.
    files
        One file a channel; empty where `path` is one file that holds all channels.
    beside
        Files that hold a part of it beside `path`, where an OME-TIFF has several.
    """

    path: Path
    channels: tuple[str, ...]
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    pixel_size_um: float | None = None
    files: tuple[Path, ...] = ()
    beside: tuple[Path, ...] = ()

    def read(self, channels: Sequence[str] | None = None) -> NDArray[Any]:
        """Read the named channels, all where None: (C, Y, X) in the file's dtype.

        Raises
        ------
        InputError
            Where the file is damaged, or float pixels are NaN, infinite or negative.
        """
        names = list(self.channels if channels is None else channels)
        indices = [self.channels.index(name) for name in names]
        if self.files:
            pixels = np.stack([read_planes(self.files[i], [0])[0] for i in indices])
        else:
            pixels = read_planes(self.path, indices)
        return self.checked(names, pixels)

    def checked(self, names: Sequence[str], pixels: NDArray[Any]) -> NDArray[Any]:
        """Return (C, y, x) pixels of some channels, refusing floats that are no intensities.

        Raises
        ------
        InputError
            Where float pixels are NaN, infinite or negative; the channel is named.
        """
        for name, plane in zip(names, pixels, strict=True) if pixels.dtype.kind == "f" else ():
            bad = int(np.count_nonzero(~np.isfinite(plane)))
            if bad:
                raise InputError(
                    f"{self.path}: channel {name!r} holds {bad} NaN or infinite pixels: repair or leave out"
                )
            if plane.min() < 0:
                raise InputError(
                    f"{self.path}: channel {name!r} holds negative pixels (least {plane.min():g}): "
                    "intensities must be raw, or shifted to start at 0"
                )
        return pixels


def open_image(path: Path, *, names: Sequence[str] = (), pattern: str | None = None) -> ImageFile:
    """Open an image by its header.

    Parameters
    ----------
    path
        A TIFF, OME-TIFF or PNG file, an OME-Zarr image, or a folder of single-channel files.
    names
        Channel names in file order, where the file itself does not tell them.
    pattern
        How a folder's files are named, e.g. ``"{channel}.tif"`` or ``"*_{channel}.png"``.

    Raises
    ------
    InputError
        Names the file: damaged or no image, wrong dtype or axes, channel names duplicate, missing or too many.
    """
    if path.is_dir() and not is_ngff(path):
        return open_channels(path, _match_folder(path, pattern))
    image = _open_file(path)
    _check_dtype(path, image.dtype)
    count = image.shape[0]
    if not image.channels:
        if not names:
            raise InputError(
                f"{path} does not name its {count} channel(s): give the names in file order, in a manifest column "
                "'channels' (DNA;LaminB1) or with channels=[...]"
            )
        if len(names) != count:
            raise InputError(f"{path} holds {count} channel(s), but {len(names)} are named: {', '.join(names)}")
        image = replace(image, channels=tuple(names))
    _check_duplicates(path, image.channels)
    return image


def open_channels(path: Path, files: Sequence[tuple[str, Path]]) -> ImageFile:
    """Open an image that lies in one file a channel, given as (channel name, file)."""
    _check_duplicates(path, [name for name, _ in files])
    opened = [_open_file(file) for _, file in files]
    first = opened[0]
    for image in opened:
        _check_dtype(image.path, image.dtype)
        if image.shape[0] != 1:
            raise InputError(f"{image.path} should hold one channel, but holds {image.shape[0]}")
        if image.shape != first.shape:
            raise InputError(
                f"{image.path} is {_size(image)} pixels, but {first.path.name} is {_size(first)}: "
                "the channels of an image must have one size"
            )
        if image.dtype != first.dtype:
            raise InputError(f"{image.path} is {image.dtype}, {first.path.name} is {first.dtype}: convert to one dtype")
    size = next((i.pixel_size_um for i in opened if i.pixel_size_um), None)
    names = tuple(name for name, _ in files)
    return ImageFile(path, names, (len(files), *first.shape[1:]), first.dtype, size, tuple(i.path for i in opened))


def open_mask(path: Path) -> ImageFile:
    """Open a label mask by its header; `shape` is (1, Y, X)."""
    mask = _open_file(path)
    if mask.shape[0] != 1 or mask.dtype.kind not in "biu":
        raise InputError(
            f"{path} is no label mask: it holds {mask.shape[0]} plane(s) of {mask.dtype}, not one plane of integers"
        )
    return mask


def stem(name: str) -> str:
    """Return a file's name without its folder and image extension."""
    base = Path(name.replace("\\", "/")).name
    return next((base[: -len(s)] for s in SUFFIXES if base.lower().endswith(s) and len(base) > len(s)), base)


def _match_folder(folder: Path, pattern: str | None) -> list[tuple[str, Path]]:
    if pattern is None or "{channel}" not in pattern:
        raise InputError(f"{folder} is a folder: say how its files are named, e.g. pattern='{{channel}}.tif'")
    parts = (re.escape(p).replace(r"\*", ".*").replace(r"\?", ".") for p in pattern.split("{channel}"))
    regex = re.compile("(?P<channel>.+)".join(parts))  # greedy stars: "*_{channel}.png" names what follows the last _
    files = sorted(p for p in folder.iterdir() if p.is_file())
    found = [(m["channel"], p) for p in files if (m := regex.fullmatch(p.name))]
    if not found:
        seen = ", ".join(p.name for p in files[:5]) or "nothing"
        raise InputError(f"{folder}: no file is named like {pattern!r}; it holds {seen}")
    return found


def _check_duplicates(path: Path, names: Sequence[str]) -> None:
    lower = [n.lower() for n in names]
    twice = sorted({n for n in names if lower.count(n.lower()) > 1})
    if twice:
        raise InputError(f"{path} has duplicate channel names: {', '.join(twice)}")


def _check_dtype(path: Path, dtype: np.dtype[Any]) -> None:
    if dtype.name not in DTYPES:
        raise InputError(f"{path} has {dtype.name} pixels: convert to one of {', '.join(DTYPES)}")


def _size(image: ImageFile) -> str:
    return f"{image.shape[1]} x {image.shape[2]}"


# --- one file -------------------------------------------------------------------------------------------------------


def _open_file(path: Path) -> ImageFile:
    if not path.exists():
        raise InputError(f"no image at {path}")
    if path.is_dir():
        if not is_ngff(path):
            raise InputError(f"{path} is a folder, not an image")
        known = open_ngff(path)
        dtype = known.dtype.newbyteorder("=")  # as `native` gives the pixels
        return ImageFile(path, known.channels, known.shape, dtype, known.pixel_size_um)
    suffix = path.suffix.lower()
    if suffix in PILLOW_SUFFIXES:
        return _open_png(path)
    if suffix in TIFF_SUFFIXES:
        return _open_tiff(path)
    raise InputError(f"{path} is neither TIFF nor PNG, by its name")


def _open_png(path: Path) -> ImageFile:
    dtypes = {"1": "bool", "L": "uint8", "I;16": "uint16", "I": "int32"}
    try:
        with Image.open(path) as image:
            mode, (x, y) = image.mode, image.size
    except Image.DecompressionBombError:
        raise InputError(f"{path} is a PNG of more than 178 megapixels: save it as a tiled TIFF") from None
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is damaged or no image ({error})") from error
    if mode not in dtypes:
        raise InputError(f"{path} is a colour picture ({mode}): save one grey-scale channel a file")
    return ImageFile(path, (), (1, y, x), np.dtype(dtypes[mode]))


def _open_tiff(path: Path) -> ImageFile:
    with open_tiff(path) as tiff:
        shape, (names, size) = shape_of(path, tiff), names_and_pixel_size(path, tiff)
        dtype = np.dtype(tiff.series[0].dtype)
        beside = tuple(path.parent / name for name in other_files(path, tiff))
    if names and len(names) != shape[0]:
        raise InputError(f"{path} holds {shape[0]} channel(s), but its metadata names {len(names)}: {', '.join(names)}")
    return ImageFile(path, names, shape, dtype, size, beside=beside)


def read_planes(path: Path, indices: Sequence[int]) -> NDArray[Any]:
    """Read planes of a file: (n, Y, X)."""
    if path.is_dir():
        return native(open_ngff(path).read(indices))
    if path.suffix.lower() in PILLOW_SUFFIXES:
        try:
            with Image.open(path) as image:
                return np.asarray(image)[None]
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{path} is truncated or damaged ({error})") from error
    with open_tiff(path) as tiff:
        _, height, width = shape_of(path, tiff)
        with open_planes(tiff, indices) as read:
            return native(read(slice(0, height), slice(0, width)))


def native(planes: NDArray[Any]) -> NDArray[Any]:
    """Return pixels contiguous, in this machine's byte order."""
    return np.ascontiguousarray(planes.astype(planes.dtype.newbyteorder("="), copy=False))
