"""The first pass over a manifest's images: headers only. It fixes the panel, dtype and pixel size of the store to be
written, and refuses what cannot be used before any work is done."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imgshared.data.manifest import Manifest, ManifestRow, without_fields
from imgshared.data.ngff import is_plate
from imgshared.data.panel import Panel, guess_chromatin, is_imputed, nearest
from imgshared.data.readers import ImageFile, open_channels, open_image, open_mask
from imgshared.types import InputError


@dataclass(frozen=True)
class Source:
    """An image that the first pass has accepted: `channels` are the panel's channels that it holds, by their names in
    the file, `shape` is (Y, X) after resampling, `pixel_size_um` that of the file. Chromatin is among them but where
    the cells were not stained for it, which takes a mask."""

    row: ManifestRow
    file: ImageFile
    channels: Mapping[int, str]
    shape: tuple[int, int]
    pixel_size_um: float | None


@dataclass(frozen=True)
class Plan:
    """What the first pass fixes for all images."""

    panel: Panel
    sources: tuple[Source, ...]
    dtype: np.dtype[Any]
    pixel_size_um: float | None
    warnings: tuple[str, ...]


def make_plan(
    table: Manifest,
    *,
    crop_px: int,
    pixel_size_um: float | None,
    source_pixel_size_um: float | None,
    chromatin: str | None,
    markers: Sequence[str] | None,
    channels: Sequence[str],
    aliases: Mapping[str, tuple[str, ...]],
    pattern: str | None,
) -> Plan:
    """Read all headers, fix panel, dtype and pixel size, and refuse what cannot be used."""
    known = _known(aliases)
    opened = _open_all(table, channels, pattern)
    _refuse_shared_files(table, opened)
    held = [_markers_of(row, file, known) for row, file in zip(table.rows, opened, strict=True)]
    panel = _panel(list(dict.fromkeys(m for names in held for m in names)), chromatin, markers, aliases)
    beside_it = {m for names in held if panel.chromatin in names for m in names}
    others = {m for m in beside_it if guess_chromatin([panel.chromatin, m]) == panel.chromatin}  # H3 beside DAPI
    first, sources = opened[0], []
    for row, file, names in zip(table.rows, opened, held, strict=True):
        if panel.chromatin not in names:
            _refuse_without_chromatin(row, panel.chromatin, names, others)
        if file.dtype != first.dtype:
            raise InputError(
                f"{row.path} is {file.dtype}, but {table.rows[0].path} is {first.dtype}: raw intensities of one store "
                "must have one scale, so convert the images to one dtype"
            )
        own = file.pixel_size_um or source_pixel_size_um
        shape = _stored_shape(row, file, own, pixel_size_um, crop_px)
        held_here = {panel.markers.index(m): name for m, name in names.items() if m in panel.markers}
        if not held_here:
            raise InputError(
                f"{row.path} holds none of {', '.join(panel.markers)}, only {', '.join(names)}: leave it out"
            )
        sources.append(Source(row, file, held_here, shape, own))
    size = pixel_size_um or _common_pixel_size(sources)
    warnings = _left_out(opened)
    without = sum(panel.chromatin_index not in source.channels for source in sources)
    if without:
        warnings.append(
            f"{without} of {len(sources)} images do not show {panel.chromatin}: methods for cells that were never "
            "stained together learn from theirs, too, but nothing is predicted from it there"
        )
    warnings += [] if table.group_column else ["the manifest has no group column: each image is a group of its own"]
    if size is None:
        warnings.append("pixel size unknown: positions are in pixels; source_pixel_size_um gives it")
    return Plan(panel, tuple(sources), first.dtype, size, tuple(warnings))


def _refuse_shared_files(table: Manifest, opened: Sequence[ImageFile]) -> None:
    """Refuse two rows that read one file: the same cells would be in the store twice, and in both their groups."""
    read_by: dict[Path, ManifestRow] = {}
    for row, file in zip(table.rows, opened, strict=True):
        for part in (file.path, *file.files, *file.beside):
            other = read_by.setdefault(part.resolve(), row)
            if other is not row:
                raise InputError(
                    f"{table.path}: {other.written} and {row.written} are one image, for both read {part}: keep one "
                    "of the two rows"
                )


def _refuse_without_chromatin(row: ManifestRow, chromatin: str, names: Iterable[str], others: Collection[str]) -> None:
    """Refuse an image without chromatin that has it by a name that is none of `others`, or no mask to find cells by."""
    lacks = f"{row.path} lacks the chromatin marker {chromatin!r}: it holds {', '.join(names)}"
    if same := guess_chromatin([name for name in names if name not in others]):
        raise InputError(f"{lacks}. If {same} is the same, say so: aliases={{{chromatin}: [{same}]}}")
    if row.mask is None:
        raise InputError(f"{lacks}, and without a mask of its nuclei or cells nothing tells where these are")


def _known(aliases: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return lower-case name or alias -> marker, to which the names of files are added as they appear."""
    known = {name.lower(): marker for marker, others in aliases.items() for name in (marker, *others)}
    if predicted := [name for name in known if is_imputed(name)]:
        raise InputError(
            f"aliases: {', '.join(predicted)} is the name of a prediction, never of a marker: leave it out"
        )
    return known


def _open_all(table: Manifest, channels: Sequence[str], pattern: str | None) -> list[ImageFile]:
    """Open every image; of a plate, name all fields that cannot be opened."""
    opened, problems = list[ImageFile](), dict[str, InputError]()
    for row in table.rows:
        try:
            opened.append(_open(row, channels, pattern))
        except InputError as error:
            if not is_plate(table.path):
                raise
            well, field = table.labels.loc[row.image, ["well", "field"]]
            problems[f"well {well} field {field}"] = error
    if problems:
        first = next(iter(problems.values()))
        if not opened:  # what all lack is no damage
            raise first
        told = ", ".join([*problems][:5]) + (", ..." if len(problems) > 5 else "")
        raise InputError(f"{len(problems)} field(s) cannot be opened: {told} ({first}). {without_fields(table.path)}")
    return opened


def _open(row: ManifestRow, channels: Sequence[str], pattern: str | None) -> ImageFile:
    if row.files:
        file = open_channels(row.path, row.files)
    else:
        file = open_image(row.path, names=row.channels or channels, pattern=pattern)
    if row.mask is not None and (mask := open_mask(row.mask)).shape[1:] != file.shape[1:]:
        sizes = [" x ".join(map(str, s[1:])) for s in (mask.shape, file.shape)]
        raise InputError(f"mask {row.mask} is {sizes[0]} pixels, but its image {row.path} is {sizes[1]}")
    return file


def _markers_of(row: ManifestRow, file: ImageFile, known: dict[str, str]) -> dict[str, str]:
    """Return marker -> the file's name for it; the manifest's promise, where there is one, says which to take.

    Predicted channels are none of them.
    """
    measured = [name for name in file.channels if not is_imputed(name)]
    promises = [name for name in row.channels if not is_imputed(name)]
    if not measured:
        raise InputError(
            f"{row.path} holds predictions alone ({', '.join(file.channels)}): give the image that was stained, or "
            "predict it with measured=true"
        )
    names: dict[str, str] = {}
    for name in measured:
        marker = known.setdefault(name.lower(), name)
        if marker in names:
            raise InputError(f"{row.path} holds the marker {marker!r} twice, as {names[marker]!r} and {name!r}")
        names[marker] = name
    for promised in promises:
        if known.get(promised.lower(), promised) not in names:
            raise InputError(
                f"the manifest promises the marker {promised!r} of {row.path}, which holds {', '.join(measured)}."
                f"{nearest(promised, measured)}"
            )
    wanted = {known[p.lower()] for p in promises} or set(names)
    return {marker: name for marker, name in names.items() if marker in wanted}


def _left_out(files: Sequence[ImageFile]) -> list[str]:
    """Say which channels are no measurements."""
    found = [[name for name in file.channels if is_imputed(name)] for file in files]
    names = dict.fromkeys(itertools.chain.from_iterable(found))
    if not names:
        return []
    count = sum(map(bool, found))
    return [f"predicted channels of {count} image(s) are no measurements and were left out: {', '.join(names)}"]


def _panel(
    union: list[str], chromatin: str | None, markers: Sequence[str] | None, aliases: Mapping[str, tuple[str, ...]]
) -> Panel:
    """Return the panel: chromatin, then the markers asked for in that order, or all by first appearance."""
    found = chromatin or guess_chromatin(union)
    if found is None:
        raise InputError(f"no marker has a usual chromatin name among {', '.join(union)}: name yours with chromatin")
    whole = Panel(tuple(union), union[0], {m: a for m, a in aliases.items() if m in union})
    first = whole.markers[whole.index(found)]
    rest = union if markers is None else [whole.markers[i] for i in whole.indices(markers)]
    kept = tuple(dict.fromkeys([first, *rest]))
    return Panel(kept, first, {m: a for m, a in whole.aliases.items() if m in kept})


def _stored_shape(
    row: ManifestRow, file: ImageFile, own: float | None, target: float | None, crop_px: int
) -> tuple[int, int]:
    if target is not None and own is None:
        raise InputError(f"{row.path} does not say its pixel size, so it cannot be resampled: set source_pixel_size_um")
    scale = own / target if own and target else 1.0
    shape = round(file.shape[1] * scale), round(file.shape[2] * scale)
    if min(shape) < crop_px:
        after = " after resampling" if scale != 1 else ""
        size = f"{shape[0]} x {shape[1]} pixels{after}"
        raise InputError(f"{row.path} is {size}: a crop of {crop_px} does not fit. Lower crop_px")
    return shape


def _common_pixel_size(sources: Sequence[Source]) -> float | None:
    first = sources[0]
    for source in sources:
        a, b = first.pixel_size_um, source.pixel_size_um
        if (a is None) != (b is None) or (a and b and abs(a - b) > 0.01 * a):
            told = [f"{size:g} µm" if size else "unknown" for size in (a, b)]
            raise InputError(
                f"pixel sizes differ: {first.row.path} {told[0]}, {source.row.path} {told[1]}. Set pixel_size_um to "
                "resample all images to one, and source_pixel_size_um for those that do not say"
            )
    return first.pixel_size_um
