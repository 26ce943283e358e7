"""Where a predicted slide lies, unfinished and finished, and what must not be written over."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr

from imgshared.data.readers import PILLOW_SUFFIXES, TIFF_SUFFIXES
from imgshared.data.store import is_store
from imgshared.types import InputError

OME_TIFF = (".ome.tif", ".ome.tiff")


def is_ome_tiff(out: Path) -> bool:
    """Say whether an image is to be written as OME-TIFF, by its name."""
    return out.name.lower().endswith(OME_TIFF)


def partial_of(out: Path) -> Path:
    """The folder beside in which an image is written before it has its name; that of an OME-TIFF is hidden."""
    return out.with_name(f".{out.name}.partial.zarr" if is_ome_tiff(out) else f"{out.name}.partial")


def cells_path(out: Path) -> Path:
    """Where the table of cells of a predicted slide lies."""
    end = next((end for end in (".ome.zarr", ".zarr", *OME_TIFF) if out.name.lower().endswith(end)), "")
    return out.with_name(f"{out.name[: len(out.name) - len(end)]}.cells.zarr")


def refuse_place(path: Path, out: Path, overwrite: bool) -> None:
    """Refuse to write what would replace the slide, or something else without `overwrite`, or under a false name.

    A table of cells may be there already where the same prediction was interrupted: it is named before the image.

    Raises
    ------
    InputError
        Names the place.
    """
    if out.name.lower().endswith((*TIFF_SUFFIXES, *PILLOW_SUFFIXES)) and not is_ome_tiff(out):
        raise InputError(f"{out}: slides are written as OME-Zarr or OME-TIFF: end the name with .ome.zarr or .ome.tif")
    unfinished, cells, source = partial_of(out), cells_path(out), path.resolve()
    beside = [Path(f"{place}{end}") for place in (out, cells) for end in (".partial", ".old")]
    for place in (out, cells, unfinished, *beside):
        here = place.resolve()
        if here == source or here in source.parents or source in here.parents:
            raise InputError(
                f"{place} is, holds or lies in the slide that is predicted: measured images are never overwritten, "
                "choose another name"
            )
    for place in (out, cells):
        if place.exists() and not overwrite and (place == out or not unfinished.exists()):
            raise InputError(f"{place} exists already: choose another name, or pass --overwrite to replace it")
    ours = out.is_file() if is_ome_tiff(out) else (out / "zarr.json").exists()
    for place, replaced, kind in ((out, ours, "image"), (cells, is_store(cells), "table of cells")):
        if place.exists() and not replaced:
            raise InputError(f"{place} is no {kind}, so it is not replaced: choose another name")


def make_way(unfinished: Path, about: Mapping[str, Any], overwrite: bool) -> None:
    """Keep what the same prediction has left, and refuse what another has.

    Raises
    ------
    InputError
        Where it is another's, and not to be overwritten; what differs is named. Where it is no prediction at all.
    """
    left = _begun(unfinished)
    changed = [name for name in about if left is None or left.get(name) != about[name]]
    if left is not None and changed and not overwrite:
        raise InputError(
            f"{unfinished} holds an interrupted prediction with another {', '.join(changed)}: pass --overwrite to "
            "replace it"
        )
    if changed:
        shutil.rmtree(unfinished, ignore_errors=True)


def _begun(unfinished: Path) -> Mapping[str, Any] | None:
    """Return the provenance of what an interrupted prediction left; None for nothing that could be gone on with."""
    attributes: dict[str, Any] = {}
    if (unfinished / "zarr.json").exists():
        try:
            attributes = dict(zarr.open_group(unfinished, mode="r").attrs)
        except Exception as error:  # whatever zarr makes of it
            raise InputError(
                f"{unfinished} is damaged, or no interrupted prediction ({error}): move it away"
            ) from error
        if "imgshared" in attributes:
            return dict(attributes["imgshared"])
    elif not unfinished.exists() or all(file.suffix == ".partial" for file in unfinished.iterdir()):
        return None
    if attributes or not (unfinished / "zarr.json").exists():
        raise InputError(f"{unfinished} is no interrupted prediction: move it away, or choose another name")
    return None  # stopped before it could say what it is
