"""Whole plates: every field of an OME-Zarr plate predicted as a slide, into a plate of the same rows and columns."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import zarr
from yaozarrs import v05

from imgshared.config import SlideConfig
from imgshared.data.ngff import Field, is_ngff, plate_fields
from imgshared.data.store import put_in_place
from imgshared.prediction.run import Run
from imgshared.slides.predict import Progress, predict_slide, refuse_place
from imgshared.slides.pyramid import partial_of
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
        As for a slide; where the plate's metadata names fields that are not there, unless ``skip_damaged``: the plate
        that is written then lacks them, too; for a mask of cells, which belongs to one image.
    """
    config = config or SlideConfig()
    if config.cells is not None:
        raise InputError("cells=... is the mask of one slide: predict the fields one by one, or prepare the plate")
    refuse_place(path, out, overwrite)
    fields = plate_fields(path)
    missing = [f.path for f in fields if not is_ngff(path / f.path)]
    if missing and not config.skip_damaged:
        told = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(
            f"{path} names {len(missing)} field(s) that are not there: {told}. Copy it again, or leave them out with "
            "skip_damaged=true"
        )
    here = [f for f in fields if f.path not in missing]
    partial, first = partial_of(out), run.fabric.global_rank == 0
    if overwrite and first:
        shutil.rmtree(partial, ignore_errors=True)
    run.fabric.barrier()
    fresh = [f for f in here if not (partial / f.path).exists()]
    for done, field in enumerate(fresh, len(here) - len(fresh)):
        if progress:
            progress(f"predict {field.well}/{field.field}", done, len(here))
        predict_slide(run, path / field.path, partial / field.path, replace(config, cells=None))
    if first:
        write_plate_metadata(partial, out.name, here, missing)
        put_in_place(partial, out)
    run.fabric.barrier()
    return out


def write_plate_metadata(folder: Path, name: str, fields: Sequence[Field], missing: Sequence[str] = ()) -> None:
    """Make a plate, OME-Zarr 0.5, of the images that lie in a folder as ``row/column/field``."""
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
    group.attrs["imgshared"] = {"kind": "predicted plate", "missing": list(missing)}
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
