"""The tables a user writes: the manifest, a row an image, and the optional table of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared.data.ngff import is_plate, plate_fields
from imgshared.data.panel import nearest
from imgshared.data.readers import stem
from imgshared.types import InputError

IMAGE_COLUMNS = ("image", "image_path", "file", "path", "filename", "file_name", "Metadata_Image", "Metadata_FileName")
MASK_COLUMNS = ("mask", "mask_path", "segmentation", "labels_path", "Metadata_Mask")
GROUP_COLUMNS = ("group", "donor", "patient", "slide", "well", "Metadata_Group", "Metadata_Donor", "Metadata_Patient",
                 "Metadata_Slide", "Metadata_Well")  # fmt: skip
PLATE_COLUMNS = ("plate", "Metadata_Plate")
CELL_IMAGE_COLUMNS = (*IMAGE_COLUMNS, "image_id", "roi", "fov", "field")
CELL_LABEL_COLUMNS = ("label", "cell_label", "cell", "cell_id", "object", "ObjectNumber", "Metadata_ObjectNumber")
FILE, FOLDER = "FileName_", "PathName_"  # CellProfiler's and Cell Painting's: one file a channel, a column each
# Columns of obs that prepare or anndata write.
RESERVED = ("cell_id", "image", "group", "label", "centroid_y_px", "centroid_x_px", "area_px", "_size", "_index")
MISSING = ("", "NA", "NaN", "nan", "<NA>", "#N/A")  # of pandas' words, without None, null and N/A: these may be classes


@dataclass(frozen=True)
class ManifestRow:
    """One image of a manifest.

    Parameters
    ----------
    image
        Its id: the file name without extension where that is unique, otherwise the path as written.
    written
        The path as the manifest writes it; that of its first channel where it has a file for each.
    path
        The file or folder.
    files
        (channel, file) for each, where the manifest has `FileName_<channel>` columns.
    mask
        Its label mask, None to segment.
    group
        The unit that is never split.
    channels
        What the manifest says the image holds; empty where it says nothing.
    """

    image: str
    written: str
    path: Path
    files: tuple[tuple[str, Path], ...]
    mask: Path | None
    group: str
    channels: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A read manifest: its rows, and the label columns (a table with one row an image, indexed by image id)."""

    path: Path
    rows: tuple[ManifestRow, ...]
    labels: pd.DataFrame
    group_column: str | None


def read_manifest(
    path: Path,
    *,
    image_column: str | None = None,
    mask_column: str | None = None,
    group_column: str | None = None,
) -> Manifest:
    """Read a CSV or Parquet manifest, or the fields of an OME-Zarr plate; paths are relative to its folder.

    A plate's fields come with the columns row, column, field and well; the well is the group.

    Columns are found by their usual names unless given. Where the group is a well and there is a plate column, the
    group is plate and well together. Without any group column each image is its own group.

    Raises
    ------
    InputError
        Where the manifest or a file it names is missing, a column is missing or cannot be stored by its name, it is
        empty, or an image occurs twice.
    """
    table, text = _read_table(path)
    mask_column = _find_column(path, table, "mask", mask_column, MASK_COLUMNS)
    found_group = _find_column(path, table, "group", group_column, GROUP_COLUMNS)
    per_channel = [c for c in table.columns if c.startswith(FILE)]
    image_name = _find_column(
        path, table, "image", image_column, IMAGE_COLUMNS, key=None if per_channel else "image_column"
    )
    if image_name is None or image_name in per_channel:
        files = _channel_files(text, per_channel)
        written = pd.Series([row[0][1] if row else None for row in files], name=" or ".join(per_channel))
    else:
        written, files = text[image_name], [()] * len(table)
    _check_filled(path, written)
    groups = _groups(path, table, text, found_group, combine=group_column is None)
    images = _image_ids(path, list(written))
    rows = tuple(
        ManifestRow(
            image=images[i],
            written=written.iloc[i],
            path=path.parent / written.iloc[i],
            files=tuple((channel, path.parent / file) for channel, file in files[i]),
            mask=_optional_path(path, text[mask_column].iloc[i]) if mask_column else None,
            group=groups[i] if groups else images[i],
            channels=_names(text["channels"].iloc[i]) if "channels" in text else (),
        )
        for i in range(len(table))
    )
    _check_files(path, rows)
    used = {image_name, mask_column, "channels", *per_channel, *(c for c in table.columns if c.startswith(FOLDER))}
    used |= {found_group} if found_group == "group" else set()  # a column 'well' stays a label too
    labels = table[[c for c in table.columns if c not in used]].copy()
    labels.index = pd.Index(images, name="image")
    _check_names(path, labels.columns)
    return Manifest(path, rows, labels, found_group)


@dataclass(frozen=True)
class CellTable:
    """Columns to join to cells by image and label.

    Parameters
    ----------
    columns
        One row a cell, indexed by (image id, label).
    unmatched
        Rows whose image is not in the manifest.
    """

    columns: pd.DataFrame
    unmatched: int

    def join(self, image: str, labels: NDArray[np.integer[Any]]) -> tuple[pd.DataFrame, NDArray[np.bool_]]:
        """Return one row for each label (missing values where the table has none) and which labels it has."""
        keys = pd.MultiIndex.from_arrays([[image] * len(labels), labels], names=self.columns.index.names)
        return self.columns.reindex(keys).reset_index(drop=True), np.asarray(keys.isin(self.columns.index))


def read_cells(
    path: Path, rows: Sequence[ManifestRow], *, image_column: str | None = None, label_column: str | None = None
) -> CellTable:
    """Read a table of cells; its images are the manifest's, as written there, by file name, or without extension.

    Raises
    ------
    InputError
        Where the table or a column is missing or cannot be stored by its name, a cell occurs twice, an image may be
        one or another of the manifest's, or none is one of them.
    """
    table, text = _read_table(path)
    image_column = _find_column(path, table, "image", image_column, CELL_IMAGE_COLUMNS, key="cells_image_column")
    label_column = _find_column(path, table, "label", label_column, CELL_LABEL_COLUMNS, key="cells_label_column")
    images = text[image_column].map(_known_images(path, rows, text[image_column]))
    if images.isna().all():
        there, here = text[image_column].iloc[0], rows[0].written
        raise InputError(f"{path}: no {image_column!r} is an image of the manifest: {there!r} here, {here!r} there")
    labels = pd.to_numeric(table[label_column], errors="coerce")
    if labels.isna().any() or (labels % 1 != 0).any():
        raise InputError(f"{path}: column {label_column!r} must hold the integer labels of the masks")
    kept = images.notna()
    columns = table.loc[kept, [c for c in table.columns if c not in (image_column, label_column)]]
    _check_names(path, columns.columns)
    columns.index = pd.MultiIndex.from_arrays([images[kept], labels[kept].astype(np.int64)], names=["image", "label"])
    if columns.index.has_duplicates:
        image, label = columns.index[columns.index.duplicated()][0]
        raise InputError(f"{path}: cell {label} of image {image!r} has more than one row")
    return CellTable(columns, int((~kept).sum()))


def _known_images(path: Path, rows: Sequence[ManifestRow], used: pd.Series[str]) -> dict[str, str]:
    """Return name -> image id, of images as written, by file name or without extension; refuse a name of several."""
    exact = {row.written: row.image for row in rows} | {row.image: row.image for row in rows}
    short: dict[str, list[ManifestRow]] = {}
    for row in rows:
        for name in {stem(row.written), Path(row.written).name} - exact.keys():
            short.setdefault(name, []).append(row)
    for name in used.dropna().unique():
        if len(several := short.get(name, [])) > 1:
            written = " or ".join(row.written for row in several[:3])
            raise InputError(f"{path}: the image {name!r} is ambiguous, for the manifest has {len(several)} of that "
                             f"name: write {written}")  # fmt: skip
    return {name: claims[0].image for name, claims in short.items()} | exact


def _check_names(path: Path, columns: pd.Index[str]) -> None:
    """Refuse columns that a store cannot hold, now rather than when all pixels are read."""
    if clash := [c for c in columns if c in RESERVED]:
        raise InputError(f"{path}: imgshared writes {', '.join(clash)} itself: rename the column(s)")
    if odd := [c for c in columns if "/" in c or not c.strip(".")]:
        raise InputError(f"{path}: no column of a store can be named {', '.join(map(repr, odd))}: rename it, without /")
    if columns.has_duplicates:
        raise InputError(f"{path} has two columns {columns[columns.duplicated()][0]!r}: rename one")


def _read_table(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table twice: with inferred types, and all as written (a well '01' is no number)."""
    if is_plate(path):
        return _plate_table(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a table, CSV or Parquet, with a row an image, or an OME-Zarr plate")
    if not path.is_file():
        raise InputError(f"no table at {path}")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pd.read_parquet(path)
            text = table.astype("string").astype(object)
        else:
            separator = "\t" if path.suffix.lower() in (".tsv", ".txt") else ","
            missing: dict[str, Any] = {"keep_default_na": False, "na_values": MISSING}
            table = pd.read_csv(path, sep=separator, low_memory=False, **missing)
            text = pd.read_csv(path, sep=separator, dtype=str, **missing)
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty") from None
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise InputError(f"{path} is neither CSV nor Parquet: {error}") from error
    if table.empty:
        raise InputError(f"{path} holds no rows")
    table.columns = text.columns = [str(c).strip() for c in table.columns]
    return table.reset_index(drop=True), text.reset_index(drop=True)


def without_fields(plate: Path) -> str:
    """Tell how to prepare a plate without what is damaged."""
    return (
        "Copy the plate again, or leave them out: in its place give a CSV with a row for each of the other fields, in "
        f"the columns image ({plate.name}/A/1/0, ...) and well"
    )


def _plate_table(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    try:
        fields = plate_fields(path)
    except InputError as error:
        raise InputError(f"{error}. {without_fields(path)}") from error
    if lost := [f"well {f.well} field {f.field}" for f in fields if not (path / f.path).exists()]:
        told = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        raise InputError(f"{path} names {len(lost)} field(s) that are not there: {told}. {without_fields(path)}")
    columns = {"image": [f"{path.name}/{f.path}" for f in fields], "well": [f.well for f in fields]}
    columns |= {name: [getattr(f, name) for f in fields] for name in ("row", "column", "field")}
    table = pd.DataFrame(columns, dtype=str)
    return table, table


def _find_column(
    path: Path, table: pd.DataFrame, what: str, given: str | None, usual: Sequence[str], *, key: str | None = None
) -> str | None:
    """Return the column given, or the first usual one (without regard to case).

    With `key`, the setting that names it, there must be one.
    """
    there = ", ".join(map(str, table.columns))
    if given is not None:
        if given not in table.columns:
            raise InputError(f"{path} has no column {given!r}.{nearest(given, table.columns)} It has: {there}")
        return given
    lower = {str(c).lower(): str(c) for c in reversed(table.columns)}
    found = next((lower[name.lower()] for name in usual if name.lower() in lower), None)
    if found is None and key:
        raise InputError(
            f"{path} has no {what} column ({', '.join(usual[:4])}, ...). It has: {there}. Name yours with {key}=..."
        )
    return found


def _groups(path: Path, table: pd.DataFrame, text: pd.DataFrame, column: str | None, *, combine: bool) -> list[str]:
    if column is None:
        return []
    _check_filled(path, text[column])
    groups = text[column].str.strip()
    plate = _find_column(path, table, "plate", None, PLATE_COLUMNS)
    if combine and plate is not None and column.lower().endswith("well"):  # A01 of two plates is two wells
        groups = text[plate].fillna("").str.strip() + "_" + groups
    return list(groups)


def _image_ids(path: Path, written: Sequence[str]) -> list[str]:
    resolved = pd.Series([str((path.parent / w).resolve()) for w in written])
    twice = [w for w, again in zip(written, resolved.duplicated(), strict=True) if again]
    if twice:
        raise InputError(f"{path}: {len(twice)} image(s) occur in more than one row: {', '.join(twice[:3])}")
    stems = pd.Series([stem(w) for w in written])
    unique = ~stems.duplicated(keep=False)
    return [s if alone else w for s, w, alone in zip(stems, written, unique, strict=True)]


def _channel_files(text: pd.DataFrame, columns: Sequence[str]) -> list[tuple[tuple[str, str], ...]]:
    """Return, for each row, (channel, folder and name of its file) of the channels that it has."""
    rows = []
    for _, row in text.iterrows():
        files = []
        for column in columns:
            channel = column[len(FILE) :]
            name, folder = row[column], row.get(FOLDER + channel)
            if isinstance(name, str) and name:
                files.append((channel, str(Path(folder if isinstance(folder, str) else "", name))))
        rows.append(tuple(files))
    return rows


def _names(cell: object) -> tuple[str, ...]:
    return tuple(n.strip() for n in cell.split(";") if n.strip()) if isinstance(cell, str) else ()


def _optional_path(path: Path, cell: object) -> Path | None:
    return path.parent / cell if isinstance(cell, str) and cell.strip() else None


def _check_filled(path: Path, column: pd.Series[str]) -> None:
    if column.isna().any():
        raise InputError(f"{path}: row {int(np.argmax(column.isna())) + 1} has no {column.name!r}")


def _check_files(path: Path, rows: Sequence[ManifestRow]) -> None:
    wanted = [p for row in rows for p in (row.path, *(f for _, f in row.files), row.mask) if p is not None]
    missing = list(dict.fromkeys(p for p in wanted if not p.exists()))
    if missing:
        shown = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise InputError(f"{path} names {len(missing)} file(s) that do not exist: {shown}")
