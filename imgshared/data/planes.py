"""Pixels of a TIFF, window by window: rows as they lie in the file, or the strips and tiles that a window meets."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from imgshared.data.tiff import series_apart

LARGE = 64 * 2**20  # bytes of a decoded strip or tile that is kept, and warned of
KEPT = 2**30  # bytes that are kept at most, but for the last
JPEG = (6, 7, 33007, 34892)  # TIFF's codes of compressions whose tables lie beside the pixels
Read = Callable[[slice, slice], NDArray[Any]]
Page = Any  # a TiffPage or TiffFrame, whose types let every attribute be None


@contextlib.contextmanager
def open_planes(tiff: tifffile.TiffFile, channels: Sequence[int], level: int = 0) -> Iterator[Read]:
    """Yield what reads windows of some channels of an opened TIFF, (n, y, x) in its dtype and byte order.

    Memory is bounded by the window and the strips or tiles that it meets. Those of more than 64 MB are warned of, and
    kept for the next window, up to 1 GiB of them.
    """
    apart = series_apart(tiff)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        decoder, planes = Decoder(pool), list[Read]()
        for channel in channels:
            series = tiff.series[apart[channel] if apart else 0].levels[level]
            planes.append(_plane(series, 0 if apart else channel, decoder))
        yield lambda rows, columns: np.stack([plane(rows, columns) for plane in planes])


def _plane(series: tifffile.TiffPageSeries, channel: int, decoder: Decoder) -> Read:
    """Return what reads windows, (y, x), of one channel."""
    sizes = dict(zip(series.axes, series.shape, strict=True))
    shape = sizes["Y"], sizes["X"]
    count = math.prod(series.shape) // math.prod(shape)
    pages: list[Page] = list(series)
    separate, _, *area, interleaved = pages[0].shaped
    if "YX" in series.axes and tuple(area) == shape and len(pages) * separate * interleaved == count:
        number, sample = divmod(channel, separate * interleaved)
        page = pages[number]
        return _rows_of(page, sample) if _lies_plain(page) else Coded(page, sample, decoder)
    if series.axes.endswith("YX") and series.dataoffset is not None and not series.is_multifile:
        offset = series.dataoffset + channel * math.prod(shape) * series.dtype.itemsize  # ImageJ: one header for all
        return Rows(_opened(pages[0]), offset, (*shape, 1), 0, _dtype(pages[0]))
    stack = [axis for axis in series.axes if axis not in "YX"]
    whole = series.asarray()  # in an order that nobody uses for large images
    ordered = np.moveaxis(whole, [series.axes.index(a) for a in (*stack, "Y", "X")], range(whole.ndim))
    plane = ordered.reshape(count, *shape)[channel]
    return lambda rows, columns: plane[rows, columns]


class Rows:
    """A plane whose pixels lie in the file as they are: only those of the window are read, and nothing is mapped.

    Parameters
    ----------
    offset
        Bytes before it in the file.
    shape
        (Y, X, S), S samples side by side of which `sample` is read.
    """

    def __init__(
        self, file: tifffile.FileHandle, offset: int, shape: tuple[int, int, int], sample: int, dtype: np.dtype[Any]
    ) -> None:
        self.file, self.offset, self.shape, self.sample, self.dtype = file, offset, shape, sample, dtype

    def __call__(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Read a window, (y, x)."""
        height, width, samples = self.shape
        (top, bottom, _), (left, right, _) = rows.indices(height), columns.indices(width)
        out = np.empty((bottom - top, right - left, samples), self.dtype)
        with self.file.lock:
            for row, line in zip(range(top, bottom), out, strict=True):
                self.file.seek(self.offset + (row * width + left) * samples * self.dtype.itemsize)
                if self.file.readinto(line.data) != line.nbytes:
                    raise ValueError(f"it ends in row {row}")
        return out[..., self.sample]


class Coded:
    """A plane in strips or tiles that must be decoded, each of them whole."""

    def __init__(self, page: Page, sample: int, decoder: Decoder) -> None:
        self.page, self.decoder, self.file = page, decoder, _opened(page)
        key = page.keyframe
        separate, _, *area, interleaved = page.shaped
        self.shape = area[0], area[1]
        self.piece = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
        self.counts = [-(-side // part) for side, part in zip(self.shape, self.piece, strict=True)]
        self.first = sample * math.prod(self.counts) if separate > 1 else 0
        self.sample = sample if interleaved > 1 else 0
        self.piece_bytes = math.prod(self.piece) * interleaved * page.dtype.itemsize

    def __call__(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Read a window, (y, x)."""
        spans = [slice(*span.indices(side)[:2]) for span, side in zip((rows, columns), self.shape, strict=True)]
        out = np.zeros([span.stop - span.start for span in spans], self.page.dtype)
        if self.piece_bytes > LARGE and out.shape != self.shape:
            self.decoder.warn(self.file.path, self.piece_bytes)
        places = [range(s.start // part, -(-s.stop // part)) for s, part in zip(spans, self.piece, strict=True)]
        spots = list(itertools.product(*places))
        for spot, pixels in zip(spots, self.decoder.pool.map(self._decoded, spots), strict=True):
            if pixels is None:
                continue  # a piece that was never written: no light
            here, there = [], []
            for k, span in enumerate(spans):
                start = spot[k] * self.piece[k]
                a, b = max(span.start, start), min(span.stop, start + pixels.shape[k])
                here.append(slice(a - span.start, b - span.start))
                there.append(slice(a - start, b - start))
            out[tuple(here)] = pixels[tuple(there)]
        return out

    def _decoded(self, spot: tuple[int, int]) -> NDArray[Any] | None:
        """Return the strip or tile at a row and column of them, (y, x); None where the file leaves it out."""
        index = self.first + spot[0] * self.counts[1] + spot[1]
        pixels = self.decoder.kept((id(self.page), index), lambda: self._decode(index))
        return None if pixels is None else pixels[0, ..., self.sample]

    def _decode(self, index: int) -> NDArray[Any] | None:
        page, size = self.page, self.page.databytecounts[index]
        if not size or not page.dataoffsets[index]:
            return None
        with self.file.lock:
            self.file.seek(page.dataoffsets[index])
            data = self.file.read(size)
        if len(data) != size:
            raise ValueError(f"it ends at byte {page.dataoffsets[index] + len(data)}")
        key = page.keyframe
        tables = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader} if key.compression in JPEG else {}
        pixels: NDArray[Any] | None = key.decode(data, index, **tables)[0]
        return pixels


class Decoder:
    """What the planes of a file share: threads, and large strips and tiles that were decoded."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool, self._lock, self._warned = pool, Lock(), False
        self._large: dict[Hashable, NDArray[Any]] = {}

    def kept(self, key: Hashable, decode: Callable[[], NDArray[Any] | None]) -> NDArray[Any] | None:
        """Return what is kept by this key, or decode it, and keep it where it is large."""
        with self._lock:
            known = self._large.get(key)
        if known is not None:
            return known
        pixels = decode()
        if pixels is not None and pixels.nbytes > LARGE:
            with self._lock:
                self._large[key] = pixels
                while len(self._large) > 1 and sum(p.nbytes for p in self._large.values()) > KEPT:
                    del self._large[next(iter(self._large))]
        return pixels

    def warn(self, path: str, size: int) -> None:
        """Warn once of strips or tiles that decode to so many bytes."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{path} lies in strips or tiles of {size >> 20} MB, each of which must be decoded whole: that takes "
                "time and memory. Rewrite it in small tiles: bfconvert -tilex 512 -tiley 512 -compression zlib, or "
                "tifffile.imwrite with tile=(512, 512)",
                stacklevel=2,
            )


def _rows_of(page: Page, sample: int) -> Rows:
    separate, _, height, width, interleaved = page.shaped
    dtype = _dtype(page)
    offset = page.dataoffsets[0] + (sample * height * width * dtype.itemsize if separate > 1 else 0)
    return Rows(_opened(page), offset, (height, width, interleaved), sample if interleaved > 1 else 0, dtype)


def _lies_plain(page: Page) -> bool:
    """Whether a page's pixels lie in one run, as they are."""
    ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    return page.is_final and ends[:-1] == list(page.dataoffsets[1:])


def _dtype(page: Page) -> np.dtype[Any]:
    """Return the dtype of pixels as they lie in the file."""
    dtype: np.dtype[Any] = page.dtype.newbyteorder(page.parent.byteorder)
    return dtype


def _opened(page: Page) -> tifffile.FileHandle:
    """Return a page's file, which tifffile closes where it is not the first of an image; `TiffFile` closes it again."""
    file: tifffile.FileHandle = page.parent.filehandle
    file.set_lock(True)
    if file.closed:
        file.open()
    return file
