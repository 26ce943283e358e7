"""TIFF and OME-TIFF by their headers: files that are whole, axes, channel names, pixel size."""

from __future__ import annotations

import contextlib
import logging
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import tifffile

from imgshared.types import InputError

MICROMETRES = {"m": 1e6, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "pm": 1e-6}
_PLACEHOLDER = re.compile(r"(channel|chan|ch|c)?[\s:_-]*\d+(:\d+)*", re.IGNORECASE)  # what writers put for "no name"
_BROKEN = (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, struct.error, tifffile.TiffFileError)


@contextlib.contextmanager
def open_tiff(path: Path) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF; damage becomes an InputError, also damage that tifffile only logs.

    Raises
    ------
    InputError
        Names the file that is truncated, damaged or missing: all files and planes of its first image must be there.
    """
    complaints: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: complaints.append(record.getMessage())  # type: ignore[method-assign]
    logger = tifffile.tifffile.logger()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with _named(path), tifffile.TiffFile(path) as tiff:
            _check_file(path, tiff)
            if any("invalid" in c or "corrupt" in c for c in complaints):
                raise ValueError(complaints[0])
            _check_image(path, tiff)
            yield tiff
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise InputError(f"{path} is truncated, damaged or no TIFF ({error}): copy it again") from error


def _check_file(path: Path, tiff: tifffile.TiffFile) -> None:
    size = path.stat().st_size
    for page in tiff.pages:
        ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if ends and max(ends) > size:
            raise ValueError(f"{size} bytes, but its pixels should reach to byte {max(ends)}")


def _check_image(path: Path, tiff: tifffile.TiffFile) -> None:
    """Refuse an image of which files or planes are not there: tifffile would read zeros."""
    others = other_files(path, tiff)
    lost = [name for name in others if not (path.parent / name).is_file()]
    if lost:
        told = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise InputError(
            f"{path} is one of {len(others) + 1} files of an image, and {len(lost)} of them not beside it: {told}. "
            "Copy all of them"
        )
    for name in others:
        with _named(path.parent / name), tifffile.TiffFile(path.parent / name) as other:
            _check_file(path.parent / name, other)
    series = tiff.series[0]
    planes = [page for level in series.levels for page in level]
    pages = [page for page in planes if page is not None]
    if len(pages) < len(planes):
        absent = len(planes) - len(pages)
        raise InputError(f"{path} lacks {absent} of the {len(planes)} planes that its metadata promise: copy it again")
    if others and all(page.parent is not tiff for page in pages):
        raise InputError(
            f"{path}: the first image of its metadata lies in other files ({', '.join(others[:3])}): give one of "
            "those, or save every image to files of its own"
        )
    first = series.keyframe
    for page in pages[: len(series)]:
        if (page.shape, page.dtype) != (first.shape, first.dtype):
            mine, rest = (f"{' x '.join(map(str, p.shape))} pixels of {p.dtype}" for p in (page, first))
            raise InputError(f"{page.parent.filehandle.path} holds {mine}, the rest of its image {rest}")


def other_files(path: Path, tiff: tifffile.TiffFile) -> list[str]:
    """Return the names of files beside `path` in which its first image lies, by its OME metadata."""
    root = ElementTree.fromstring(tiff.ome_metadata or "<OME/>")
    image, found = root.find("{*}Image"), dict[str, None]()
    for uuid in image.iterfind("{*}Pixels/{*}TiffData/{*}UUID") if image is not None else ():
        name = uuid.get("FileName", "")
        if name and name.lower() != path.name.lower() and uuid.text != root.get("UUID"):  # it may have been renamed
            found[name] = None
    return list(found)


def series_apart(tiff: tifffile.TiffFile) -> list[int]:
    """Return the series of each channel where pages were written one by one; none where one series holds all."""
    series = tiff.series[0]
    if len(tiff.series) < 2 or series.axes != "YX" or tiff.is_ome:
        return []
    return [k for k, s in enumerate(tiff.series) if s.axes == "YX" and s.shape == series.shape]


def shape_of(path: Path, tiff: tifffile.TiffFile) -> tuple[int, int, int]:
    """Return (C, Y, X).

    Raises
    ------
    InputError
        Where it holds focal planes, time points, colours, other axes, or several images.
    """
    series = tiff.series[0]
    if apart := series_apart(tiff):
        return len(apart), series.shape[0], series.shape[1]
    sizes = dict(zip(series.axes, series.shape, strict=True))
    for axis, word in (("Z", "focal planes"), ("T", "time points")):
        if sizes.get(axis, 1) > 1:
            raise InputError(f"{path} holds {sizes[axis]} {word}: project or split it to one plane a channel first")
    if sizes.get("S", 1) > 1 and series.axes.endswith("S") and series.keyframe.photometric == 2:
        raise InputError(f"{path} is an RGB picture: save one grey-scale channel a stain")
    stack = [n for axis, n in sizes.items() if axis not in "YX" and n > 1]
    if len(stack) > 1 or "Y" not in sizes or "X" not in sizes:
        raise InputError(f"{path} has axes {series.axes} {series.shape}: it should be channels, rows and columns (CYX)")
    if more := _images_beside_the_first(tiff):
        raise InputError(
            f"{path} holds {more + 1} images, of which only the first would be read: save each to a file of its own "
            f"(bfconvert -series 1 {path.name} second.ome.tif)"
        )
    return stack[0] if stack else 1, sizes["Y"], sizes["X"]


def _images_beside_the_first(tiff: tifffile.TiffFile) -> int:
    """Count the file's other images that are like its first; labels and overviews of a scanner are not."""

    def kind(series: tifffile.TiffPageSeries) -> tuple[Any, ...]:
        stack = [n for axis, n in zip(series.axes, series.shape, strict=True) if axis not in "YX"]
        return series.axes, series.dtype, stack

    first, *others = tiff.series
    alike = [s for s in others if tiff.is_ome and kind(s) == kind(first)]
    return sum(any(page is not None and page.parent is tiff for page in s) for s in alike)


def names_and_pixel_size(path: Path, tiff: tifffile.TiffFile) -> tuple[tuple[str, ...], float | None]:
    """Return the channels' names, none where it does not tell them all, and micrometres a pixel.

    Raises
    ------
    InputError
        Where pixels are not square.
    """
    return _ome(path, tiff) if tiff.is_ome else _imagej(tiff) if tiff.is_imagej else ((), None)


def _ome(path: Path, tiff: tifffile.TiffFile) -> tuple[tuple[str, ...], float | None]:
    """Of the first image; no names where any is missing or a placeholder."""
    pixels = ElementTree.fromstring(tiff.ome_metadata or "<OME/>").find(".//{*}Image/{*}Pixels")
    if pixels is None:
        return (), None
    names = tuple((c.get("Name") or "").strip() for c in pixels.findall("{*}Channel"))
    sizes = []
    for axis in "XY":
        value, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        if value is not None and unit in MICROMETRES:
            sizes.append(float(value) * MICROMETRES[unit])
    if len(sizes) == 2 and abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):
        raise InputError(f"{path}: pixels are not square ({sizes[0]:g} x {sizes[1]:g} µm): resample it first")
    named = bool(names) and all(n and not _PLACEHOLDER.fullmatch(n) for n in names)
    return (names if named else ()), (sizes[0] if sizes and sizes[0] > 0 else None)


def _imagej(tiff: tifffile.TiffFile) -> tuple[tuple[str, ...], float | None]:
    """ImageJ's slice labels where there is one a channel, and the pixel size."""
    meta = tiff.imagej_metadata or {}
    labels = meta.get("Labels") or []
    labels = [labels] if isinstance(labels, str) else labels
    names = tuple(str(n).strip() for n in labels) if len(labels) == meta.get("images", 1) else ()
    factor = MICROMETRES.get(str(meta.get("unit", "")).replace("\\u00B5", "µ"))
    resolution = tiff.pages.first.tags.get("XResolution")
    if factor is None or resolution is None or not resolution.value[0]:
        return names, None
    return names, factor * resolution.value[1] / resolution.value[0]
