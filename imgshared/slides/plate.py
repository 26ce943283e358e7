"""Whole plates: every field of an OME-Zarr plate predicted as a slide, into a plate of the same rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zarr
from yaozarrs import v05

from imgshared.config import SlideConfig
from imgshared.data.ngff import Field, is_plate, open_ngff, plate_fields
from imgshared.data.place import put_in_place
from imgshared.prediction.run import Run
from imgshared.slides.job import provenance
from imgshared.slides.place import is_ome_tiff, make_way, partial_of, refuse_place
from imgshared.slides.predict import Progress, predict_slide
from imgshared.types import InputError


def predict_plate(
    run: Run,
    path: Path,
    out: Path,
    config: SlideConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Predict every field of an OME-Zarr plate; see `predict_slide`.

    Written: an OME-Zarr 0.5 plate. An interrupted prediction is gone on with by the same call.

    Raises
    ------
    InputError
        As for a slide; for a mask of cells, which belongs to one image; where a well or field that the metadata names
        is not there or cannot be opened. With ``skip_damaged`` the plate that is written lacks these, and its
        provenance names them under ``missing``.
    """
    config = config or SlideConfig()
    if config.cells is not None:
        raise InputError("cells=... is the mask of one slide: predict the fields one by one, or prepare the plate")
    if is_ome_tiff(out):
        raise InputError(f"{out}: a plate is written as OME-Zarr: end the name with .ome.zarr")
    refuse_place(path, out, overwrite)
    here, missing = _fields(path, config.skip_damaged)
    unfinished, first = partial_of(out), run.fabric.global_rank == 0
    about = {**provenance(run, path, config), "kind": "predicted plate"}
    if first:
        make_way(unfinished, about, overwrite)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        zarr.open_group(unfinished, mode="a", zarr_format=3).attrs["imgshared"] = about
    run.fabric.barrier()
    fresh = [f for f in here if not (unfinished / f.path).exists()]
    for done, field in enumerate(fresh, len(here) - len(fresh)):
        if progress:
            progress(f"predict {field.well}/{field.field}", done, len(here))
        predict_slide(run, path / field.path, unfinished / field.path, config)
    if first:
        write_plate_metadata(unfinished, out.name, here, {**about, "missing": missing})
        put_in_place(unfinished, out)
    run.fabric.barrier()
    return out


def _fields(path: Path, skip_damaged: bool) -> tuple[list[Field], list[str]]:
    """Return the fields that can be opened, and the paths of the wells and fields that cannot."""
    try:
        named, missing = plate_fields(path), list[str]()
    except InputError as error:
        if not is_plate(path):
            raise
        if not skip_damaged:
            raise InputError(f"{error}. Copy it again, or leave out what is lost with skip_damaged=true") from error
        named, missing = _whole_wells(path)
        if not named:
            raise
    problems = {}
    for field in named:
        try:
            open_ngff(path / field.path)
        except InputError as error:
            problems[field.path] = error
    if problems and (not skip_damaged or len(problems) == len(named)):
        told = ", ".join(list(problems)[:3]) + (", ..." if len(problems) > 3 else "")
        raise InputError(
            f"{path} names {len(problems)} field(s) that are not there or cannot be opened: {told} "
            f"({next(iter(problems.values()))}). Copy it again, or leave them out with skip_damaged=true"
        )
    return [f for f in named if f.path not in problems], [*missing, *problems]


def _whole_wells(path: Path) -> tuple[list[Field], list[str]]:
    """Return the fields of the wells whose metadata can be read, and the paths of the other wells."""
    said: Any = dict(zarr.open_group(path, mode="r").attrs)
    plate, fields, lost = said.get("ome", said)["plate"], list[Field](), list[str]()
    for well in plate.get("wells", ()):
        try:
            row, column = (plate[f"{axis}s"][well[f"{axis}Index"]]["name"] for axis in ("row", "column"))
            inside: Any = dict(zarr.open_group(path / well["path"], mode="r").attrs)
            images = inside.get("ome", inside)["well"]["images"]
            fields += [Field(f"{well['path']}/{image['path']}", row, column, image["path"]) for image in images]
        except Exception:  # whatever zarr makes of it
            lost.append(well["path"])
    return fields, lost


def write_plate_metadata(
    folder: Path, name: str, fields: Sequence[Field], about: Mapping[str, Any] | None = None
) -> None:
    """Make a plate, OME-Zarr 0.5, of the images that lie in a folder as ``row/column/field``; `about` is provenance."""
    rows, columns = (sorted({getattr(f, axis) for f in fields}, key=_order) for axis in ("row", "column"))
    wells = list(dict.fromkeys((f.row, f.column) for f in fields))
    plate = {
        "name": name,
        "rows": [{"name": row} for row in rows],
        "columns": [{"name": column} for column in columns],
        "wells": [
            {"path": f"{r}/{c}", "rowIndex": rows.index(r), "columnIndex": columns.index(c)} for r, c in wells
        ],
    }  # fmt: skip
    group = _group(folder, v05.Plate.model_validate({"version": "0.5", "plate": plate}))
    if about is not None:
        group.attrs["imgshared"] = dict(about)
    for row in rows:
        zarr.open_group(folder / row, mode="a", zarr_format=3)
    for r, c in wells:
        images = [{"path": f.field} for f in fields if (f.row, f.column) == (r, c)]
        _group(folder / r / c, v05.Well.model_validate({"version": "0.5", "well": {"images": images}}))


def _group(folder: Path, metadata: Any) -> zarr.Group:
    group = zarr.open_group(folder, mode="a", zarr_format=3)
    group.attrs["ome"] = metadata.model_dump(mode="json", exclude_none=True)
    return group


def _order(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() else (len(name), name)
