"""OME-Zarr 0.4 and 0.5: images with their pyramids, and plates, known by their metadata, pixels read where wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import ValidationError
from yaozarrs import v04, v05

from imgshared.types import InputError

MICROMETRES = {
    "meter": 1e6,
    "millimeter": 1e3,
    "micrometer": 1.0,
    "nanometer": 1e-3,
    "picometer": 1e-6,
    "angstrom": 1e-4,
}


@dataclass(frozen=True)
class NgffImage:
    """An image of an OME-Zarr.

    Parameters
    ----------
    channels
        Labels of `omero`; empty where it does not tell them all.
    shape
        (C, Y, X) of the finest level.
    levels
        Arrays of the pyramid, finest first.
    axes
        Their axes, of ``tczyx``; t and z have one plane each.
    pixel_size_um
        Micrometres a pixel of the finest level, None where it does not say.
    """

    channels: tuple[str, ...]
    shape: tuple[int, int, int]
    levels: tuple[zarr.Array[Any], ...]
    axes: str
    pixel_size_um: float | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels."""
        return np.dtype(self.levels[0].dtype)

    def read(
        self, channels: Sequence[int], rows: slice = slice(None), columns: slice = slice(None), level: int = 0
    ) -> NDArray[Any]:
        """Read a window of some channels, (n, Y, X)."""
        at = {"y": rows, "x": columns}
        planes = []
        for channel in channels:
            place = tuple(at.get(axis, channel if axis == "c" else 0) for axis in self.axes)
            planes.append(np.asarray(self.levels[level][place]))
        return np.stack(planes)


def is_ngff(path: Path) -> bool:
    """Say whether a folder is a Zarr group or array."""
    return path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs"))


def open_ngff(path: Path) -> NgffImage:
    """Open an image by its metadata.

    Raises
    ------
    InputError
        Where it is no OME-Zarr image, or one of several planes or time points, or with other axes.
    """
    group, known = _open(path, ("Image", "LabelImage"))
    image = known.multiscales[0]
    axes = "".join(axis.name for axis in image.axes)
    levels = tuple(_level(path, group, dataset.path) for dataset in image.datasets)
    shape = dict(zip(axes, levels[0].shape, strict=True))
    if set(axes) - set("tczyx") or not {"y", "x"} <= set(axes):
        raise InputError(f"{path} has axes {axes}: it should be channels, rows and columns (CYX)")
    for axis, word in (("z", "focal planes"), ("t", "time points")):
        if shape.get(axis, 1) > 1:
            raise InputError(f"{path} holds {shape[axis]} {word}: project or split it to one plane a channel first")
    omero = getattr(known, "omero", None)
    names = tuple((c.label or "").strip() for c in omero.channels) if omero else ()
    count = shape.get("c", 1)
    if names and len(names) != count:
        raise InputError(f"{path} holds {count} channel(s), but its metadata names {len(names)}: {', '.join(names)}")
    return NgffImage(
        names if all(names) else (), (count, shape["y"], shape["x"]), levels, axes, _pixel_size(path, image, axes)
    )


@dataclass(frozen=True)
class Field:
    """A field of a well of a plate; `path` is relative to the plate."""

    path: str
    row: str
    column: str
    field: str

    @property
    def well(self) -> str:
        """Row and column, the latter with two digits: A01."""
        return f"{self.row}{self.column.zfill(2)}"


def is_plate(path: Path) -> bool:
    """Say whether a folder is an OME-Zarr plate."""
    if not is_ngff(path):
        return False
    attributes: dict[str, Any] = dict(_group(path).attrs)
    return "plate" in attributes.get("ome", attributes)


def plate_fields(path: Path) -> list[Field]:
    """Return every field of a plate, well by well.

    Raises
    ------
    InputError
        Where the metadata is none of a plate, or a well that it names is missing.
    """
    _, known = _open(path, ("Plate",))
    plate, found = known.plate, []
    for well in plate.wells:
        row, column = plate.rows[well.rowIndex].name, plate.columns[well.columnIndex].name
        if not (path / well.path).exists():
            raise InputError(f"{path}: its metadata names the well {well.path}, which is not there")
        _, fields = _open(path / well.path, ("Well",))
        found += [Field(f"{well.path}/{f.path}", row, column, f.path) for f in fields.well.images]
    return found


def _group(path: Path) -> zarr.Group:
    try:
        return zarr.open_group(path, mode="r")
    except Exception as error:
        raise InputError(f"{path} is damaged or no Zarr group ({error})") from error


def _open(path: Path, kinds: Sequence[str]) -> tuple[zarr.Group, Any]:
    """Return a group and its metadata as one of these kinds of the version that it is of."""
    group = _group(path)
    attributes: dict[str, Any] = dict(group.attrs)
    version, said = (v05, attributes["ome"]) if "ome" in attributes else (v04, attributes)
    if "bioformats2raw.layout" in said:
        raise InputError(f"{path} holds several images: name one of them, e.g. {path / '0'}")
    first: ValidationError | None = None
    for kind in kinds:
        try:
            return group, getattr(version, kind).model_validate(said)
        except ValidationError as error:
            first = first or error
    assert first is not None
    problem = first.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    raise InputError(f"{path} is no valid OME-Zarr {kinds[0].lower()}: {where}: {problem['msg']}")


def _level(path: Path, group: zarr.Group, name: str) -> zarr.Array[Any]:
    level = group.get(name)
    if not isinstance(level, zarr.Array):
        raise InputError(f"{path} promises a level {name!r} that is not there: copy it again")
    return level


def _pixel_size(path: Path, image: Any, axes: str) -> float | None:
    """Micrometres a pixel, where the axes have a unit of length."""
    sizes = []
    for axis in "yx":
        at = axes.index(axis)
        unit = MICROMETRES.get(str(image.axes[at].unit))
        if unit is None:
            return None
        moves = [*image.datasets[0].coordinateTransformations, *(image.coordinateTransformations or ())]
        sizes.append(unit * float(np.prod([move.scale[at] for move in moves if move.type == "scale"])))
    if abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):
        raise InputError(f"{path}: pixels are not square ({sizes[0]:g} x {sizes[1]:g} µm): resample it first")
    return float(sizes[0])
