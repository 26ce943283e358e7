"""A sharded OME-Zarr 0.5 with its pyramid, written tile by tile by any number of processes, and gone on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from yaozarrs import v05

from imgshared.slides.damage import RECORD

CHUNK = 256
SMALLEST = 1024  # px; the last level's longer side at most
COLOURS = ("0072B2", "E69F00", "009E73", "CC79A7", "56B4E9", "D55E00", "F0E442")  # Okabe & Ito: told apart by all
DONE = "tiles-done"  # files in the unfinished image, one a process; a line a tile


@dataclass(frozen=True)
class ChannelLook:
    """A channel's name, and the raw intensities that a viewer shows as black and as bright."""

    name: str
    dark: float
    bright: float


class PyramidWriter:
    """Written tile by tile into a folder; what is there already is gone on with.

    Parameters
    ----------
    folder
        Where the image lies until it is whole.
    shape
        (C, Y, X) of the finest level.
    dtype
        Of the pixels.
    tile
        Side of the tiles that come, a multiple of 256 px: each fills one shard a channel, so that no two writers touch
        the same file.
    about
        Provenance, JSON; kept as the attribute ``imgshared``.
    rank
        Of this process; the first one makes the arrays, before the others open them.

    Attributes
    ----------
    whole
        Whether an interrupted writer had finished it.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        dtype: np.dtype[Any],
        *,
        tile: int,
        about: Mapping[str, Any],
        rank: int = 0,
    ) -> None:
        self.folder, self.shape, self.dtype, self.tile = folder, shape, dtype, tile
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._group = zarr.open_group(folder, mode="a" if rank == 0 else "r+", zarr_format=3)
        self._finest = self._level(0, shape)
        self.whole = "ome" in self._group.attrs
        if rank == 0 and "imgshared" not in self._group.attrs:
            self._group.attrs["imgshared"] = dict(about)  # last: what has it can be gone on with
        self._record = folder / f"{DONE}.{rank}"

    def done(self) -> set[int]:
        """Return the numbers of the tiles that any process has finished."""
        lines = [line for file in self.folder.glob(f"{DONE}.*") for line in file.read_text().splitlines(True)]
        return {int(line) for line in lines if line.endswith("\n")}  # a line without an end was cut off

    def write(self, number: int, rows: slice, columns: slice, pixels: NDArray[Any]) -> None:
        """Write a tile, (C, y, x), and remember that it is done."""
        self._finest[:, rows, columns] = pixels
        self.note(number)

    def note(self, number: int) -> None:
        """Remember that a tile is done: one that holds nothing is not written."""
        with self._record.open("a") as file:
            file.write(f"{number}\n")

    def finish(
        self,
        name: str,
        channels: Sequence[ChannelLook],
        pixel_size_um: float | None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the coarser levels, each pixel the mean of four, and write the metadata of the whole.

        `about` is added to the provenance.
        """
        levels = [self._finest]
        while max(levels[-1].shape[1:]) > SMALLEST:
            levels.append(self._coarser(len(levels), levels[-1]))
        for cut_off in self.folder.rglob("*.partial"):  # what zarr was writing when a process was killed
            cut_off.unlink()
        known: Any = self._group.attrs["imgshared"]
        image = image_metadata(name, channels, pixel_size_um, len(levels), self.dtype)
        self._group.attrs.put({"imgshared": {**known, **(about or {})}, "ome": image})  # at once: now it is whole
        self.whole = True

    def forget(self) -> None:
        """Remove what was written down for an interrupted writer to go on from: of a whole image, nothing is left."""
        for kind in (DONE, RECORD):
            for file in self.folder.glob(f"{kind}.*"):
                file.unlink()

    def _level(self, number: int, shape: tuple[int, ...]) -> zarr.Array[Any]:
        if str(number) in self._group:
            return self._group[str(number)]  # type: ignore[return-value]
        return self._group.create_array(
            str(number), shape=shape, dtype=self.dtype, chunks=(1, CHUNK, CHUNK), shards=(1, self.tile, self.tile),
            dimension_names=("c", "y", "x"),
        )  # fmt: skip

    def _coarser(self, number: int, finer: zarr.Array[Any]) -> zarr.Array[Any]:
        channels, height, width = finer.shape
        coarser = self._level(number, (channels, -(-height // 2), -(-width // 2)))
        for channel in range(channels):
            for y in range(0, coarser.shape[1], self.tile):
                for x in range(0, coarser.shape[2], self.tile):
                    part = np.asarray(finer[channel, 2 * y : 2 * (y + self.tile), 2 * x : 2 * (x + self.tile)])
                    if part.any():  # glass costs nothing
                        coarser[channel, y : y + self.tile, x : x + self.tile] = halved(part)
        return coarser


def image_metadata(
    name: str, channels: Sequence[ChannelLook], pixel_size_um: float | None, levels: int, dtype: np.dtype[Any]
) -> dict[str, Any]:
    """Return the OME-Zarr 0.5 metadata of a CYX image whose levels halve, each pixel the mean of four."""
    unit = {"unit": "micrometer"} if pixel_size_um else {}
    axes = [{"name": "c", "type": "channel"}, *({"name": a, "type": "space", **unit} for a in "yx")]
    size = pixel_size_um or 1.0
    datasets = []
    for k in range(levels):
        moved = size * (2.0**k - 1) / 2  # the first pixel's middle lies between those that it is the mean of
        datasets.append({
            "path": str(k),
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, *[size * 2.0**k] * 2]},
                {"type": "translation", "translation": [0.0, moved, moved]},
            ],
        })  # fmt: skip
    top = float(np.iinfo(dtype).max) if dtype.kind == "u" else max(c.bright for c in channels)
    shown = [
        {
            "label": c.name, "color": COLOURS[k % len(COLOURS)], "active": True,
            "window": {"min": 0.0, "max": max(top, c.bright), "start": c.dark, "end": c.bright},
        }
        for k, c in enumerate(channels)
    ]  # fmt: skip
    image = v05.Image.model_validate(
        {
            "version": "0.5",
            "multiscales": [{"name": name, "axes": axes, "datasets": datasets, "type": "mean"}],
            "omero": {"channels": shown},
        }
    )
    return image.model_dump(mode="json", exclude_none=True)


def halved(image: NDArray[Any]) -> NDArray[Any]:
    """Mean of each four pixels of (Y, X), an odd last row or column of what is there; integers are rounded."""
    height, width = image.shape
    whole = np.pad(image, ((0, height % 2), (0, width % 2)), mode="edge").astype(np.float32)
    mean = (whole[::2, ::2] + whole[1::2, ::2] + whole[::2, 1::2] + whole[1::2, 1::2]) / 4
    return np.rint(mean).astype(image.dtype) if image.dtype.kind in "ui" else mean.astype(image.dtype)
