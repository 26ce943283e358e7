"""Where a predicted slide lies, unfinished and finished, and what must not be written over."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tifffile
import zarr

from imgshared.data.place import refuse_source
from imgshared.data.readers import PILLOW_SUFFIXES, TIFF_SUFFIXES
from imgshared.data.store import is_ours
from imgshared.types import InputError

OME_TIFF = (".ome.tif", ".ome.tiff")


def is_ome_tiff(out: Path) -> bool:
    """Say whether an image is to be written as OME-TIFF, by its name."""
    return out.name.lower().endswith(OME_TIFF)


def partial_of(out: Path) -> Path:
    """The folder beside in which an image is written before it has its name; that of an OME-TIFF is hidden."""
    out = out.resolve()  # of a link, beside what it leads to: a name is given on one disk alone
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
    out = out.resolve()
    if out.name.lower().endswith((*TIFF_SUFFIXES, *PILLOW_SUFFIXES)) and not is_ome_tiff(out):
        raise InputError(f"{out}: slides are written as OME-Zarr or OME-TIFF: end the name with .ome.zarr or .ome.tif")
    unfinished, cells = partial_of(out), cells_path(out)
    refuse_source(path, (out, cells, unfinished), "slide")
    for place in (out, cells):
        if place.exists() and not overwrite and (place == out or not unfinished.exists()):
            raise InputError(f"{place} exists already: choose another name, or pass --overwrite to replace it")
    image = out.is_file() if is_ome_tiff(out) else (out / "zarr.json").exists()
    ours = ((out, image, "image"), (out, _predicted(out), "prediction"), (cells, is_ours(cells), "table of cells"))
    for place, replaced, kind in ours:
        if place.exists() and not replaced:
            raise InputError(f"{place} is no {kind}, so it is not replaced: choose another name")


def _predicted(out: Path) -> bool:
    """Say whether a slide or plate that was predicted lies there, by its provenance."""
    try:
        if is_ome_tiff(out):
            with tifffile.TiffFile(out) as tiff:
                return 'Namespace="imgshared"' in (tiff.ome_metadata or "")
        about: Any = zarr.open_group(out, mode="r").attrs["imgshared"]
        return about["kind"] in ("predicted slide", "predicted plate")
    except Exception:  # whatever zarr and tifffile make of other things
        return False


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
    files = (file for file in unfinished.rglob("*") if file.is_file() and file.suffix != ".partial")
    if attributes or any(file.name != "zarr.json" for file in files):
        raise InputError(f"{unfinished} is no interrupted prediction: move it away, or choose another name")
    return None  # stopped before it could say what it is
