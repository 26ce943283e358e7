"""A pyramidal, tiled OME-TIFF of an OME-Zarr image, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from imgshared.data.ngff import open_ngff
from imgshared.slides.pyramid import COLOURS

TILE = 256


def write_ome_tiff(source: Path, out: Path) -> Path:
    """Write all levels of an OME-Zarr image that `PyramidWriter` wrote, channel names and provenance included.

    Written beside, into ``<out>.partial``, and renamed. Memory holds one row of tiles.
    """
    image = open_ngff(source)
    about: Any = zarr.open_group(source, mode="r").attrs["imgshared"]
    partial = Path(f"{out}.partial")
    try:
        with tifffile.TiffWriter(partial, bigtiff=True, ome=True) as tiff:
            for k, level in enumerate(image.levels):
                metadata = None if k else _metadata(image.channels, image.pixel_size_um, about)
                tiff.write(
                    _tiles(level), shape=level.shape, dtype=level.dtype, tile=(TILE, TILE), compression="zlib",
                    photometric="minisblack", metadata=metadata, subfiletype=1 if k else 0,
                    subifds=None if k else len(image.levels) - 1,
                )  # fmt: skip
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _tiles(level: zarr.Array[Any]) -> Iterator[NDArray[Any]]:
    """Every tile of (C, Y, X), channel by channel, row by row; those at the end are filled with zeros."""
    channels, height, width = level.shape
    for channel in range(channels):
        for y in range(0, height, TILE):
            band = np.asarray(level[channel, y : y + TILE])
            band = np.pad(band, ((0, TILE - len(band)), (0, -width % TILE)))
            for x in range(0, width, TILE):
                yield np.ascontiguousarray(band[:, x : x + TILE])


def _metadata(names: tuple[str, ...], pixel_size_um: float | None, about: Mapping[str, Any]) -> dict[str, Any]:
    size: dict[str, Any] = {}
    if pixel_size_um:
        size = {f"PhysicalSize{a}": pixel_size_um for a in "XY"} | {f"PhysicalSize{a}Unit": "µm" for a in "XY"}
    # OME wants RGBA as a signed 32-bit integer.
    colours = [int(COLOURS[k % len(COLOURS)], 16) << 8 | 0xFF for k in range(len(names))]
    signed = [c - (1 << 32) if c >= 1 << 31 else c for c in colours]
    flat = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
    return {
        "axes": "CYX",
        "Channel": {"Name": list(names), "Color": signed},
        "Description": f"Stains predicted by imgshared {about['version']}: {', '.join(about['imputed'])}",
        "MapAnnotation": {"Namespace": "imgshared", **flat},
        **size,
    }
