"""The cell store: an AnnData on Zarr whose `obsm` holds the cell crops, written as a stream.

Layout: `obs` (cell_id, image, group, labels, centroids), `var` (the panel), `X` (mean raw intensity in the cell's mask,
NaN where not measured), `layers["measured"]`, `obsm["spatial"]` (x, y in micrometres, or pixels where the pixel size is
unknown), `obsm["single_cell_images"]` (N, C, Y, X) raw, `obsm["cell_masks"]` (N, Y, X). `anndata.read_zarr` opens it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anndata
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from imgshared.data.intact import damage_told, promise_every_chunk, refuse_lost_chunks
from imgshared.data.panel import Panel
from imgshared.data.place import partial_of, put_in_place
from imgshared.types import InputError

IMAGES, MASKS = "single_cell_images", "cell_masks"
CHUNK_BYTES = 256 * 1024  # a few crops: training reads cells at random
SHARD_CHUNKS = 64  # one file holds many chunks: few files for millions of cells
COMPLETE = "imgshared-complete"  # attribute of the whole: false while it is written


class StoreWriter:
    """Write an AnnData on Zarr as a stream: rows are appended to `obsm` arrays, the small tables come last.

    Everything is written beside, into ``<path>.partial``, and renamed when it is whole: an interrupted run leaves no
    store that looks whole. As a context manager it also removes what is unfinished on leaving, and says where the disk
    was full. Memory holds one shard an array, whatever the number of cells. Empty chunks are written too, so that a
    lost one can be told.

    Parameters
    ----------
    path
        The store to write, a folder; of a link, what it leads to.
    overwrite
        Replace an existing store; otherwise refuse it with `InputError`. Anything but a store is always refused.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path, self.partial = Path(path), partial_of(Path(path))
        refuse_existing(self.path, overwrite)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"encoding-type": "anndata", "encoding-version": "0.1.0", COMPLETE: False}
        self._root = zarr.open_group(self.partial, mode="w", zarr_format=3, attributes=about)
        for name in ("obsm", "layers", "varm", "obsp", "varp"):
            self._root.create_group(name).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._pending: dict[str, list[NDArray[Any]]] = {}
        self._hash = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)  # gone already where the store was finished
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"the disk is full: {self.path} could not be written and was removed. Free space and run again"
            ) from error

    def append(self, **rows: NDArray[Any]) -> None:
        """Append rows to `obsm` arrays; the first call fixes each array's row shape and dtype."""
        for name, block in sorted(rows.items()):  # so the hash does not tell who wrote them
            block = np.ascontiguousarray(block)
            if name not in self._arrays:
                chunk = max(1, CHUNK_BYTES // max(1, int(np.prod(block.shape[1:])) * block.itemsize))
                tail = block.shape[1:]
                self._arrays[name] = self._root["obsm"].create_array(  # type: ignore[union-attr]
                    name,
                    shape=(0, *tail),
                    chunks=(chunk, *tail),
                    shards=(chunk * SHARD_CHUNKS, *tail),
                    dtype=block.dtype,
                    config={"write_empty_chunks": True},
                )
                self._arrays[name].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
                self._pending[name] = []
            self._hash.update(name.encode())
            self._hash.update(block.tobytes())
            self._pending[name].append(block)
            self._flush(name, whole_shards=True)

    def _flush(self, name: str, *, whole_shards: bool) -> None:
        array, blocks = self._arrays[name], self._pending[name]
        waiting = sum(len(b) for b in blocks)
        assert array.shards is not None
        ready = waiting - waiting % array.shards[0] if whole_shards else waiting
        if not ready:
            return
        rows = np.concatenate(blocks)
        array.append(rows[:ready])
        self._pending[name] = [rows[ready:]] if ready < len(rows) else []

    def finish(
        self,
        obs: pd.DataFrame,
        var: pd.DataFrame,
        x: NDArray[np.floating[Any]],
        *,
        layers: Mapping[str, NDArray[Any]],
        obsm: Mapping[str, NDArray[Any]],
        info: Mapping[str, Any],
    ) -> Path:
        """Write the tables, mark the store whole and give it its name.

        `info` is any JSON value; it lands in ``uns["imgshared"]`` together with the hash of the appended rows.
        """
        for name in self._arrays:
            self._flush(name, whole_shards=False)
        with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": True}):
            warnings.simplefilter("ignore")  # zarr announces its future sharding default on every table
            write = anndata.io.write_elem
            write(self._root, "obs", obs)
            write(self._root, "var", var)
            write(self._root, "X", np.asarray(x, np.float32))
            for name, layer in layers.items():
                write(self._root["layers"], name, layer)
            for name, small in obsm.items():
                write(self._root["obsm"], name, small)
            write(self._root, "uns", {"imgshared": json.dumps({**info, "data_hash": self._hash.hexdigest()})})
        promise_every_chunk(self._root)
        self._root.attrs[COMPLETE] = True
        put_in_place(self.partial, self.path)
        return self.path


class CellStore:
    """A cell store opened for reading; crops are read only when asked for.

    Attributes
    ----------
    path
        Its folder.
    obs
        One row a cell, the index is the cell id.
    measured
        (N, C) bool, which markers were stained in which cell.
    info
        What `prepare` recorded: pixel size, crop size, intensity ranges, dropped cells, data hash.

    Raises
    ------
    InputError
        Where the path is no store, one that an interrupted run left behind, or one that lacks files. Whatever is read
        of it later raises it too where it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._root = _open_complete(self.path)
        with damage_told(self.path):
            refuse_lost_chunks(self.path, self._root)
            self.info: dict[str, Any] = json.loads(anndata.io.read_elem(self._root["uns"])["imgshared"])
        self.obs: pd.DataFrame = self._table("obs")
        self.measured: NDArray[np.bool_] = self._table("layers/measured")

    def __len__(self) -> int:
        return len(self.obs)

    @cached_property
    def panel(self) -> Panel:
        """The markers in channel order.

        Raises
        ------
        InputError
            Where the cells were predicted, not measured.
        """
        if self.info.get("kind") == "predictions":
            raise InputError(
                f"{self.path} holds predictions, not measured cells: give the store that they were made of, "
                f"{self.info.get('store')}"
            )
        var: pd.DataFrame = self._table("var")
        aliases = {str(m): tuple(str(text).split(";")) for m, text in var["aliases"].items() if text}
        chromatin = var.index[var["chromatin"].to_numpy(bool)]
        if not len(chromatin):
            raise InputError(f"{self.path} holds no chromatin stain: it is no store that `imgshared prepare` wrote")
        return Panel(tuple(map(str, var.index)), str(chromatin[0]), aliases)

    @property
    def markers(self) -> tuple[str, ...]:
        """The markers of `var`, in channel order."""
        return tuple(map(str, self._table("var").index))

    @property
    def crop_px(self) -> int:
        """Side of a crop in pixels."""
        return int(self.info["crop_px"])

    @property
    def pixel_size_um(self) -> float | None:
        """Micrometres a pixel, None where the images did not say."""
        return self.info["pixel_size_um"]  # type: ignore[no-any-return]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the raw crops."""
        return np.dtype(self._array(IMAGES).dtype)

    @property
    def mask_neighbours(self) -> bool:
        """Whether the pixels of other cells are zero in a crop."""
        return bool(self.info.get("mask_neighbours", False))  # only `prepare` masks, and says so

    @property
    def data_hash(self) -> str:
        """SHA-256 of the crops, masks included."""
        return str(self.info["data_hash"])

    @property
    def mean_intensity(self) -> NDArray[np.float32]:
        """(N, C) mean raw intensity in each cell's mask, NaN where not measured."""
        return np.asarray(self._table("X"), np.float32)

    def images(self, cells: NDArray[np.integer[Any]] | slice = slice(None)) -> NDArray[Any]:
        """Read crops: (n, C, Y, X) in raw intensities; zero where a marker is not measured."""
        return self._read(IMAGES, cells)

    def masks(self, cells: NDArray[np.integer[Any]] | slice = slice(None)) -> NDArray[np.bool_]:
        """Read the mask of each crop's own cell: (n, Y, X) bool."""
        return self._read(MASKS, cells).astype(bool)

    def obsm(self, name: str, cells: NDArray[np.integer[Any]] | slice = slice(None)) -> NDArray[Any]:
        """Read rows of any `obsm` array by name."""
        return self._read(name, cells)

    def layers(self) -> dict[str, NDArray[Any]]:
        """Read all layers, each (N, C)."""
        return {name: np.asarray(self._table(f"layers/{name}")) for name in self._names("layers")}

    def obsm_names(self) -> list[str]:
        """Names of the `obsm` arrays."""
        return self._names("obsm")

    def anndata(self) -> anndata.AnnData:
        """Read the whole store into memory as an AnnData."""
        with damage_told(self.path):
            return anndata.read_zarr(self.path)

    def _names(self, group: str) -> list[str]:
        with damage_told(self.path):
            return sorted(self._root[group].array_keys())  # type: ignore[union-attr]

    def _table(self, name: str) -> Any:
        with damage_told(self.path):
            return anndata.io.read_elem(self._root[name])

    def _array(self, name: str) -> zarr.Array[Any]:
        with damage_told(self.path):
            if f"obsm/{name}" not in self._root:
                raise InputError(f"{self.path} holds no {name}: it is not a store that `imgshared prepare` wrote")
            return self._root[f"obsm/{name}"]  # type: ignore[return-value]

    def _read(self, name: str, cells: NDArray[np.integer[Any]] | slice) -> NDArray[Any]:
        array = self._array(name)
        with damage_told(self.path):
            return np.asarray(array[cells]) if isinstance(cells, slice) else read_rows(array, cells)


def read_rows(array: zarr.Array[Any], rows: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """Read rows of an array, in any order: (N, ...) to (n, ...). Memory holds them and one shard."""
    if len(rows) == 0:
        return np.empty((0, *array.shape[1:]), array.dtype)
    unique, inverse = np.unique(rows, return_inverse=True)
    shard = (array.shards or array.chunks)[0]
    far = (np.diff(unique) > 4 * array.chunks[0]) | (np.diff(unique // shard) > 0)  # no slice exceeds a shard
    found, start = np.empty((len(unique), *array.shape[1:]), array.dtype), 0
    # Near rows in one slice: Zarr's own fancy index is slow and large on shards.
    for run in np.split(unique, np.flatnonzero(far) + 1):
        found[start : start + len(run)] = np.asarray(array[run[0] : run[-1] + 1])[run - run[0]]
        start += len(run)
    return found if np.array_equal(unique, rows) else found[inverse]


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse to write a store where something is, but for a store to be replaced, or what an interrupted run left.

    Raises
    ------
    InputError
        Names the place.
    """
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already: choose another name, or pass --overwrite to replace it")
    if path.exists() and not is_ours(path):
        raise InputError(f"{path} is not a store, so it is not replaced: choose another name")
    partial = partial_of(path)
    if partial.exists() and _attributes(partial).get(COMPLETE) is not False:
        raise InputError(f"{partial} is in the way, and no interrupted run left it: move it away")


def write_anndata(table: anndata.AnnData, folder: Path) -> None:
    """Write a whole AnnData on Zarr, in the format of the stores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr announces its future sharding default on every table
        anndata.io.write_elem(zarr.open_group(folder, mode="w", zarr_format=3), "/", table)


def is_store(path: Path) -> bool:
    """Say whether a folder is an AnnData on Zarr, whole or not."""
    return _attributes(path).get("encoding-type") == "anndata"


def is_ours(path: Path) -> bool:
    """Say whether a folder is an AnnData on Zarr that imgshared wrote: a store, or the cells of a slide."""
    return is_store(path) and (path / "uns" / "imgshared" / "zarr.json").exists()


def _attributes(path: Path) -> dict[str, Any]:
    try:
        return zarr.open_group(path, mode="r").attrs.asdict()
    except Exception:  # whatever zarr makes of other folders
        return {}


def open_zarr(path: Path) -> zarr.Group:
    """Open a Zarr group for reading.

    Raises
    ------
    InputError
        Where there is nothing, or something else.
    """
    if not path.exists():
        partial = partial_of(path)
        hint = f" An interrupted run left {partial}: run the command again." if partial.exists() else ""
        raise InputError(f"no store at {path}.{hint}")
    try:
        return zarr.open_group(path, mode="r", use_consolidated=False)  # a copy, old where an array was added later
    except Exception as error:
        raise InputError(
            f"{path} is not a Zarr store: give one that imgshared wrote, or for a slide its .tif or .ome.zarr ({error})"
        ) from error


def _open_complete(path: Path) -> zarr.Group:
    root = open_zarr(path)
    if root.attrs.get("encoding-type") != "anndata" or not root.attrs.get(COMPLETE):
        raise InputError(
            f"{path} is not a whole cell store: the run that wrote it was interrupted, or it is something else. "
            "Run `imgshared prepare` again."
        )
    return root


def panel_table(panel: Panel) -> pd.DataFrame:
    """Return the panel as an AnnData `var` table."""
    return pd.DataFrame(
        {
            "chromatin": [m == panel.chromatin for m in panel.markers],
            "aliases": [";".join(panel.aliases.get(m, ())) for m in panel.markers],
        },
        index=pd.Index(panel.markers, name="marker"),
    )
