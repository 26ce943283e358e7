"""From a manifest and images to a cell store, image by image.

The first pass (`plan.py`) reads headers only; the second, here, reads, segments, cuts and writes one image at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared.data.crops import Cells, IntensityRange, cut, find_cells, resample, resampled_labels
from imgshared.data.manifest import CellTable, Manifest, ManifestRow, read_cells, read_manifest
from imgshared.data.outlines import draw_outlines, picture_folder, publish, stride_of
from imgshared.data.plan import Plan, Source, make_plan
from imgshared.data.scan import Labelled, ReadLabels, Watched, connected, labels_in, scan
from imgshared.data.segment import SegmentSettings, length_px, segment_nuclei
from imgshared.data.store import IMAGES, MASKS, StoreWriter, panel_table
from imgshared.data.windows import Resampled, read_labels, windows
from imgshared.types import InputError

SCALED_IMAGES, SCALED_SHARE = 4, 0.9  # from so many images, so many of which share minimum and maximum


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
    chromatin
        The marker that was taken for chromatin.
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
    chromatin: str
    measured: Mapping[str, int]
    intensity: Mapping[str, Mapping[str, float]]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        columns = ("min", "p1", "p50", "p99", "max")
        width = max(len("marker"), *map(len, self.measured))
        lines = [f"{self.path}: {self.cells} cells of {self.images} images, chromatin is {self.chromatin}", ""]
        lines.append(f"{'marker':<{width}} {'measured':>9}" + "".join(f"{c:>11}" for c in columns))
        for marker, count in self.measured.items():
            values = self.intensity.get(marker) or {}
            shown = "".join(f"{values[c]:>11.5g}" if c in values else f"{'-':>11}" for c in columns)
            lines.append(f"{marker:<{width}} {count:>9}{shown}")
        lines += ["", "dropped: " + (", ".join(f"{n} ({why})" for why, n in self.dropped.items()) or "none")]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


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
        The store to write; pictures of the outlines go beside it, into ``<out without .zarr>.qc``, and where no store
        is made into ``<out without .zarr>.qc.partial``.
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
    with StoreWriter(out, overwrite=overwrite) as writer:
        pictures = picture_folder(out) if qc else None
        tally = _Tally(plan, crop_px, mask_neighbours, segment, writer, pictures, joined)
        for done, source in enumerate(plan.sources, 1):
            tally.add(source)
            if progress is not None:
                progress(done, len(plan.sources), source.row.image)
        summary = tally.finish(table)
    if pictures:
        publish(pictures)
    return summary


def _read_joined(path: Path, table: Manifest, image_column: str | None, label_column: str | None) -> CellTable:
    joined = read_cells(path, table.rows, image_column=image_column, label_column=label_column)
    clash = [c for c in joined.columns.columns if c in table.labels.columns]
    if clash:
        raise InputError(f"{path} and {table.path} both have the column(s) {', '.join(clash)}: rename one")
    return joined


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
        self.extremes: list[dict[int, tuple[float, float]]] = []
        self.empty: list[str] = []
        self.binary: list[str] = []

    def add(self, source: Source) -> None:
        """Read one image, tile by tile where it has a mask, and append its cells."""
        with self._opened(source) as (image, labels, raw):
            stride = stride_of(image.shape)
            chromatin = self.plan.panel.chromatin_index
            found = scan(image, list(source.channels).index(chromatin) if chromatin in source.channels else 0, stride)
            extremes = zip(raw.least.tolist(), raw.most.tolist(), strict=True)  # of the file's own pixels
            self.extremes.append(dict(zip(source.channels, extremes, strict=True)))
            cells, dropped = find_cells(found, image.shape, self.crop_px, labels)
            self.found += labels
            self.dropped.update(dropped)
            if not labels:
                self.empty.append(source.row.image)
            if self.pictures is not None:
                size = self.plan.pixel_size_um
                draw_outlines(
                    self.pictures / f"{source.row.image.replace('/', '_')}.png", found.picture, found.outlined,
                    cells.labels, title=f"{source.row.image}: {len(cells)} kept, {sum(dropped.values())} dropped",
                    pixel_size_um=size * stride if size else None,
                )  # fmt: skip
            for block, crops, own in cut(image, cells, self.crop_px, mask_neighbours=self.mask_neighbours):
                self._append(source, block, crops, own)

    @contextlib.contextmanager
    def _opened(self, source: Source) -> Iterator[tuple[Labelled, int, Watched]]:
        """Yield what reads the image (its channels of the panel) and its labels on the store's grid, how many labels
        there are, and what reads the file's own pixels.

        Without a mask the image is read whole, for its background and threshold are those of all of it.
        """
        names, given = list(source.channels.values()), (source.file.shape[1], source.file.shape[2])
        if source.row.mask is None:
            whole = source.file.read(names)
            raw = Watched(source.file, names, lambda *at: whole[:, *at])
            image = raw(*(slice(0, side) for side in given))
            image = image if given == source.shape else resample(image, source.shape)
            chromatin = image[list(source.channels).index(self.plan.panel.chromatin_index)]
            mask = segment_nuclei(chromatin, self.segment, self.plan.pixel_size_um)
            yield Labelled(lambda *at: image[:, *at], lambda *at: mask[at], source.shape), int(mask.max()), raw
            return
        with windows(source.file, names) as pixels, read_labels(source.row.mask) as read:
            labels, count = self._numbered(source.row, read, given)
            raw = Watched(source.file, names, pixels)
            if given == source.shape:
                yield Labelled(raw, labels, given), count, raw
            else:
                grid = resampled_labels(labels, given, source.shape)
                yield Labelled(Resampled(raw, given, source.shape), grid, source.shape), count, raw

    def _numbered(self, row: ManifestRow, read: ReadLabels, shape: tuple[int, int]) -> tuple[ReadLabels, int]:
        """Return what reads the labels, and how many there are; those of a binary mask are its connected parts."""
        count = len(labels_in(read, shape))
        if count != 1 or row.mask is None:
            return read, count
        parts, count = connected(read, shape, row.mask)
        if count == 1:
            return read, 1
        self.binary.append(row.image)
        return (lambda *at: parts[at]), count

    def _append(self, source: Source, cells: Cells, crops: NDArray[Any], own: NDArray[np.bool_]) -> None:
        channels = list(source.channels)
        whole = np.zeros((len(crops), len(self.plan.panel), *crops.shape[2:]), self.plan.dtype)
        whole[:, channels] = crops
        self.writer.append(**{IMAGES: whole, MASKS: own})
        for i, channel in enumerate(channels):
            self.ranges.add(channel, crops[:, i])
        self.overflowing += int((own.sum(axis=(1, 2)) < cells.area_px).sum())
        x = np.full((len(cells), len(self.plan.panel)), np.nan, np.float32)
        x[:, channels] = cells.means
        self.x.append(x)
        self.obs.append(self._table(source, cells))

    def _table(self, source: Source, cells: Cells) -> pd.DataFrame:
        """Return the rows of `obs` for one image; centroids are in the pixels of the file."""
        scale = np.array(source.file.shape[1:]) / source.shape
        centroids = (cells.centroids_px + 0.5) * scale - 0.5
        table = pd.DataFrame(
            {
                "cell_id": [f"{source.row.image}:{label}" for label in cells.labels],
                "image": source.row.image,
                "group": source.row.group,
                "label": cells.labels,
                "centroid_y_px": centroids[:, 0],
                "centroid_x_px": centroids[:, 1],
                "area_px": cells.area_px,
                "_size": source.pixel_size_um or 1.0,
            }
        )
        if self.joined is None:
            return table
        more, known = self.joined.join(source.row.image, cells.labels)
        self.without_row += int((~known).sum())
        return pd.concat([table, more], axis=1)

    def finish(self, manifest: Manifest) -> PrepareSummary:
        """Write the tables that come last and say what was done."""
        plan = self.plan
        self._check_any(manifest)
        obs = pd.concat(self.obs, ignore_index=True)
        measured = np.isfinite(np.concatenate(self.x))
        obs = obs.join(manifest.labels, on="image").set_index("cell_id")
        spatial = obs[["centroid_x_px", "centroid_y_px"]].to_numpy() * obs.pop("_size").to_numpy()[:, None]
        for name in obs.columns[[d.kind not in "biuf" for d in map(_numpy_dtype, obs.dtypes)]]:
            obs[name] = obs[name].astype("string").astype(object).astype("category")
        ranges = {m: self.ranges.of(i, plan.dtype) for i, m in enumerate(plan.panel.markers)}
        counts = {m: int(n) for m, n in zip(plan.panel.markers, measured.sum(axis=0), strict=True)}
        segmented = any(source.row.mask is None for source in plan.sources)
        info = {
            "kind": "cells",
            "version": version("imgshared"),
            "crop_px": self.crop_px,
            "pixel_size_um": plan.pixel_size_um,
            "dtype": plan.dtype.name,
            "mask_neighbours": self.mask_neighbours,
            "images": len(plan.sources),
            "dropped": dict(self.dropped),
            "intensity": ranges,
            "measured": counts,
            "scaled_by_image": self._scaled(),
            "segmentation": dataclasses.asdict(self.segment) if segmented else "masks",
            "manifest": manifest.path.name,
        }
        self.writer.finish(
            obs,
            panel_table(plan.panel),
            np.concatenate(self.x),
            layers={"measured": measured},
            obsm={"spatial": spatial},
            info=info,
        )
        return PrepareSummary(
            self.writer.path, len(plan.sources), len(obs), dict(self.dropped), plan.panel.chromatin, counts, ranges,
            self._warnings(),
        )  # fmt: skip

    def _check_any(self, manifest: Manifest) -> None:
        look = f" The outlines are in {self.pictures}." if self.pictures else ""
        if not self.found:
            raise InputError(
                f"no nuclei found in any image of {manifest.path} ({', '.join(self.empty[:3])}, ...): is "
                f"{self.plan.panel.chromatin!r} the chromatin stain? Lower segment.threshold_scale, or set "
                f"segment.min_diameter and max_diameter to your nuclei.{look}"
            )
        if not self.obs:
            why = ", ".join(f"{n} ({reason})" for reason, n in self.dropped.items())
            raise InputError(f"all {self.found} nuclei were dropped: {why}. Lower crop_px ({self.crop_px}).{look}")
        if self.joined is not None and self.without_row == sum(map(len, self.obs)):
            raise InputError(f"no label of the table of cells is a label of the masks of {manifest.path}")

    def _scaled(self) -> list[str]:
        """Return the markers whose images nearly all span one and the same range, as no camera's do."""
        found = []
        for c, marker in enumerate(self.plan.panel.markers):
            spans = Counter(image[c] for image in self.extremes if c in image and image[c][0] < image[c][1])
            if spans.total() >= SCALED_IMAGES and max(spans.values()) >= SCALED_SHARE * spans.total():
                found.append(marker)
        return found

    def _warnings(self) -> tuple[str, ...]:
        notes = [
            (len(self.empty), f"image(s) without nuclei: {', '.join(self.empty[:5])}"),
            (len(self.binary), f"binary mask(s), connected parts taken for cells: {', '.join(self.binary[:5])}"),
            (self.overflowing, f"cell(s) larger than the crop of {self.crop_px} px, cut at its edge"),
            (self.without_row, "cell(s) without a row in the table of cells"),
            (self.joined.unmatched if self.joined else 0, "row(s) of the table of cells name no image of the manifest"),
        ]
        scaled = self._scaled()
        mend = "use the microscope's own files, or brightness cannot be compared between images"
        said = (
            [f"every image of {', '.join(scaled)} spans the same range, as if scaled one by one: {mend}"]
            if scaled
            else []
        )
        return (*self.plan.warnings, *said, *(f"{count} {text}" for count, text in notes if count))


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    return dtype if isinstance(dtype, np.dtype) else np.dtype(object)
