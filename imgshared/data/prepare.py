"""From a manifest and images to a cell store, image by image.

The first pass reads headers only, fixes the panel and finds what is wrong before any work is done; the second reads,
segments, cuts and writes one image at a time.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from imgshared.data.crops import Cells, IntensityRange, consecutive, cut, find_cells, mean_raw, resample, resample_labels
from imgshared.data.manifest import CellTable, Manifest, ManifestRow, read_cells, read_manifest
from imgshared.data.outlines import draw_outlines
from imgshared.data.panel import Panel, guess_chromatin, nearest
from imgshared.data.readers import ImageFile, open_channels, open_image, open_mask, read_mask
from imgshared.data.segment import SegmentSettings, length_px, segment_nuclei
from imgshared.data.store import IMAGES, MASKS, StoreWriter, panel_table
from imgshared.types import InputError


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` did.

    Parameters
    ----------
    path
        The store.
    images, cells
        How many were read and kept.
    dropped
        Reason -> cells.
    measured
        Marker -> cells in which it was stained.
    intensity
        Marker -> min, p1, p50, p99, max of the raw crops.
    warnings
        What the user should know.
    """

    path: Path
    images: int
    cells: int
    dropped: Mapping[str, int]
    measured: Mapping[str, int]
    intensity: Mapping[str, Mapping[str, float]]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        columns = ("min", "p1", "p50", "p99", "max")
        width = max(len("marker"), *map(len, self.measured))
        lines = [f"{self.path}: {self.cells} cells of {self.images} images", ""]
        lines.append(f"{'marker':<{width}} {'measured':>9}" + "".join(f"{c:>9}" for c in columns))
        for marker, count in self.measured.items():
            values = self.intensity.get(marker) or {}
            shown = "".join(f"{values[c]:>9.4g}" if c in values else f"{'-':>9}" for c in columns)
            lines.append(f"{marker:<{width}} {count:>9}{shown}")
        lines += ["", "dropped: " + (", ".join(f"{n} ({why})" for why, n in self.dropped.items()) or "none")]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


@dataclass(frozen=True)
class Source:
    """An image that the first pass has accepted: `channels` are the panel's channels that it holds, by their names in
    the file, `shape` is (Y, X) after resampling, `pixel_size_um` that of the file."""

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


def prepare(
    manifest: Path | str,
    out: Path | str,
    *,
    crop_px: int = 64,
    pixel_size_um: float | None = None,
    source_pixel_size_um: float | None = None,
    chromatin: str | None = None,
    markers: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    image_column: str | None = None,
    mask_column: str | None = None,
    group_column: str | None = None,
    pattern: str | None = None,
    cells: Path | str | None = None,
    cells_image_column: str | None = None,
    cells_label_column: str | None = None,
    mask_neighbours: bool = False,
    segment: SegmentSettings | None = None,
    qc: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> PrepareSummary:
    """Cut the cells of a manifest's images into a cell store.

    Parameters
    ----------
    manifest
        CSV or Parquet, one row an image; see `read_manifest`.
    out
        The store to write; pictures of the outlines go beside it, into ``<out>.qc``.
    crop_px
        Side of the crops, pixels (after resampling).
    pixel_size_um
        Resample every image to this; None keeps the images' own, which then must agree.
    source_pixel_size_um
        Where the images do not say.
    chromatin, markers
        The chromatin marker (None: found by its usual names) and the markers to keep beside it (None: all).
    channels
        Channel names in file order, where neither the file nor the manifest names them.
    aliases
        Marker -> other names under which images may hold it.
    pattern
        How the files of an image that is a folder are named, e.g. ``"{channel}.tif"``.
    cells
        A table with image, label and columns to join into `obs`.
    mask_neighbours
        Zero the pixels of other cells in a crop.
    segment
        How nuclei are found in images without a mask.
    progress
        Called with (images done, images in all, image id).

    Raises
    ------
    InputError
        Names what cannot be used; no store is left behind.
    """
    manifest, out, segment = Path(manifest), Path(out), segment or SegmentSettings()
    table = read_manifest(manifest, image_column=image_column, mask_column=mask_column, group_column=group_column)
    joined = _read_joined(Path(cells), table, cells_image_column, cells_label_column) if cells else None
    plan = make_plan(
        table,
        crop_px=crop_px,
        pixel_size_um=pixel_size_um,
        source_pixel_size_um=source_pixel_size_um,
        chromatin=chromatin,
        markers=markers,
        channels=channels or (),
        aliases={m: tuple(a) for m, a in (aliases or {}).items()},
        pattern=pattern,
    )
    if any(source.row.mask is None for source in plan.sources):
        for name in ("smooth", "background", "min_diameter", "max_diameter", "split"):
            length_px(getattr(segment, name), plan.pixel_size_um)
    pictures = _picture_folder(out) if qc else None
    with _writer(out, overwrite) as writer:
        tally = _Tally(plan, crop_px, mask_neighbours, segment, writer, pictures, joined)
        for done, source in enumerate(plan.sources, 1):
            tally.add(source)
            if progress is not None:
                progress(done, len(plan.sources), source.row.image)
        return tally.finish(table, out)


def _read_joined(path: Path, table: Manifest, image_column: str | None, label_column: str | None) -> CellTable:
    joined = read_cells(path, table.rows, image_column=image_column, label_column=label_column)
    clash = [c for c in joined.columns.columns if c in table.labels.columns]
    if clash:
        raise InputError(f"{path} and {table.path} both have the column(s) {', '.join(clash)}: rename one")
    return joined


def _picture_folder(out: Path) -> Path:
    folder = out.with_suffix(".qc")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    return folder


@contextmanager
def _writer(out: Path, overwrite: bool) -> Iterator[StoreWriter]:
    """A store writer that leaves nothing behind where the work does not come to its end."""
    writer = StoreWriter(out, overwrite=overwrite)
    try:
        yield writer
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"the disk is full: {out} could not be written and was removed. Free space and run again"
            ) from error
        raise
    finally:
        shutil.rmtree(writer.partial, ignore_errors=True)  # gone already where the store was finished


# --- first pass: headers --------------------------------------------------------------------------------------------


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
    known: dict[str, str] = {}  # lower-case name or alias -> marker, in order of first appearance
    for marker, others in aliases.items():
        known.update({name.lower(): marker for name in (marker, *others)})
    opened = [_open(row, channels, pattern) for row in table.rows]
    held = [_markers_of(row, file, known) for row, file in zip(table.rows, opened, strict=True)]
    panel = _panel(list(dict.fromkeys(m for names in held for m in names)), chromatin, markers, aliases)
    first, sources = opened[0], []
    for row, file, names in zip(table.rows, opened, held, strict=True):
        if panel.chromatin not in names:
            raise InputError(f"{row.path} lacks the chromatin marker {panel.chromatin!r}: it holds {', '.join(names)}")
        if file.dtype != first.dtype:
            raise InputError(
                f"{row.path} is {file.dtype}, but {table.rows[0].path} is {first.dtype}: raw intensities of one store "
                "must have one scale, so convert the images to one dtype"
            )
        own = file.pixel_size_um or source_pixel_size_um
        shape = _stored_shape(row, file, own, pixel_size_um, crop_px)
        held_here = {panel.markers.index(m): name for m, name in names.items() if m in panel.markers}
        sources.append(Source(row, file, held_here, shape, own))
    size = pixel_size_um or _common_pixel_size(sources)
    warnings = [] if table.group_column else ["the manifest has no group column: each image is a group of its own"]
    if size is None:
        warnings.append("pixel size unknown: positions are in pixels, and no other microscope's images can be compared")
    return Plan(panel, tuple(sources), first.dtype, size, tuple(warnings))


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
    """Return marker -> the file's name for it; the manifest's promise, where there is one, says which to take."""
    names: dict[str, str] = {}
    for name in file.channels:
        marker = known.setdefault(name.lower(), name)
        if marker in names:
            raise InputError(f"{row.path} holds the marker {marker!r} twice, as {names[marker]!r} and {name!r}")
        names[marker] = name
    for promised in row.channels:
        if known.get(promised.lower(), promised) not in names:
            raise InputError(
                f"the manifest promises the marker {promised!r} of {row.path}, which holds {', '.join(file.channels)}."
                f"{nearest(promised, file.channels)}"
            )
    wanted = {known[p.lower()] for p in row.channels} or set(names)
    return {marker: name for marker, name in names.items() if marker in wanted}


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
        raise InputError(f"{row.path} is {shape[0]} x {shape[1]} pixels{after}: a crop of {crop_px} does not fit. Lower crop_px")
    return shape


def _common_pixel_size(sources: Sequence[Source]) -> float | None:
    first = sources[0]
    for source in sources:
        a, b = first.pixel_size_um, source.pixel_size_um
        if (a is None) != (b is None) or (a and b and abs(a - b) > 0.01 * a):
            told = [f"{s.row.path} ({f'{s.pixel_size_um:g} µm' if s.pixel_size_um else 'unknown'})" for s in (first, source)]
            raise InputError(
                f"pixel sizes differ: {told[0]}, {told[1]}. Set pixel_size_um to resample all images to one, and "
                "source_pixel_size_um for those that do not say"
            )
    return first.pixel_size_um


# --- second pass: pixels --------------------------------------------------------------------------------------------


class _Tally:
    """Writes the crops of one image after the other and keeps the small tables that come last."""

    def __init__(
        self,
        plan: Plan,
        crop_px: int,
        mask_neighbours: bool,
        segment: SegmentSettings,
        writer: StoreWriter,
        pictures: Path | None,
        joined: CellTable | None,
    ) -> None:
        self.plan, self.crop_px, self.mask_neighbours, self.segment = plan, crop_px, mask_neighbours, segment
        self.writer, self.pictures, self.joined = writer, pictures, joined
        self.dropped: Counter[str] = Counter()
        self.ranges = IntensityRange(len(plan.panel))
        self.obs: list[pd.DataFrame] = []
        self.x: list[NDArray[np.float32]] = []
        self.found = self.without_row = self.overflowing = 0
        self.empty: list[str] = []
        self.binary: list[str] = []

    def add(self, source: Source) -> None:
        """Read one image and append its cells."""
        image, mask, labels = self._pixels(source)
        cells = find_cells(mask, labels, self.crop_px)
        self.found += len(labels)
        self.dropped.update(cells.dropped)
        if not len(labels):
            self.empty.append(source.row.image)
        if self.pictures is not None:
            chromatin = image[list(source.channels).index(self.plan.panel.chromatin_index)]
            draw_outlines(
                self.pictures / f"{source.row.image.replace('/', '_')}.png", chromatin, mask, cells.numbers,
                title=f"{source.row.image}: {len(cells)} kept, {sum(cells.dropped.values())} dropped",
                pixel_size_um=self.plan.pixel_size_um,
            )  # fmt: skip
        if not len(cells):
            return
        columns = list(source.channels)
        for crops, own in cut(image, mask, cells, self.crop_px, mask_neighbours=self.mask_neighbours):
            whole = np.zeros((len(crops), len(self.plan.panel), self.crop_px, self.crop_px), self.plan.dtype)
            whole[:, columns] = crops
            self.writer.append(**{IMAGES: whole, MASKS: own})
            for i, channel in enumerate(columns):
                self.ranges.add(channel, crops[:, i])
            self.overflowing += int((own.sum(axis=(1, 2)) < cells.area_px[self._block(own)]).sum())
        x = np.full((len(cells), len(self.plan.panel)), np.nan, np.float32)
        x[:, columns] = mean_raw(image, mask, cells)
        self.x.append(x)
        self.obs.append(self._table(source, cells))
