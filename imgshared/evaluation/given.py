"""Which images are judged: the mean prediction, the sharp one, or what a store of predictions holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
import zarr
from numpy.typing import NDArray

from imgshared.config import EvaluateConfig
from imgshared.data.panel import nearest
from imgshared.data.store import CellStore, open_zarr, read_rows
from imgshared.evaluation.collect import Predict
from imgshared.prediction import Run
from imgshared.prediction.types import PredictedCells
from imgshared.types import InputError


def images_to_judge(predict: Predict, run: Run, store: CellStore, config: EvaluateConfig) -> Predict:
    """Return what is called as `predict` is, with the chosen images as ``predicted``.

    Raises
    ------
    InputError
        Where the run has no sharp output, or the store of predictions does not belong to `store`.
    """
    if config.predictions is not None:
        return Stored(predict, run, store, Path(config.predictions), sharp=config.sharp)
    if config.sharp:
        run.refuse_sharp(True)
        return _Sharp(predict)
    return predict


@dataclasses.dataclass(frozen=True)
class _Sharp:
    predict: Predict

    def __call__(self, run: Run, store: CellStore, cells: NDArray[np.intp], **wishes: Any) -> PredictedCells:
        done = self.predict(run, store, cells, sharp=True, **wishes)
        images = {name: image for name, image in done.images.items() if name != "sharp"}
        return dataclasses.replace(done, images={**images, "predicted": done.images["sharp"]}, scale=None)


@dataclasses.dataclass(frozen=True)
class Given:
    """Predicted images in an AnnData on Zarr, of `imgshared predict` or of another tool; read when asked for.

    Parameters
    ----------
    path
        Its folder.
    obs_names
        (N,) the cells.
    markers
        (T,) of whose stains there are images.
    info
        Provenance, JSON or a dict in ``uns["imgshared"]``, each where it is known: `run`, the run's folder;
        `store_hash`, of the measured store; `sources`, the markers predicted from.
    array
        (N, T, Y, X) raw intensities.
    """

    path: Path
    obs_names: pd.Index[str]
    markers: tuple[str, ...]
    info: dict[str, Any]
    array: zarr.Array[Any]

    @staticmethod
    def open(path: str | Path, *, sharp: bool = False) -> Given:
        """Open ``obsm["predicted_images"]``, or with `sharp` ``obsm["sharp_images"]``.

        Raises
        ------
        InputError
            Where the path is no AnnData on Zarr, has no such images, of another shape, or a cell or marker twice.
        """
        path, name = Path(path), "sharp_images" if sharp else "predicted_images"
        root = open_zarr(path)
        if "obs" not in root or "var" not in root:
            raise InputError(
                f"predictions: {path} holds no obs and var, so it is no AnnData, or its writing was interrupted: write "
                "it with AnnData.write_zarr"
            )
        array = root.get(f"obsm/{name}")
        if not isinstance(array, zarr.Array):
            raise InputError(
                f"predictions: {path} holds no {name}: give a store that `imgshared predict` wrote, or an AnnData with "
                f'raw intensities, (cells, markers, Y, X), in obsm["{name}"]'
            )
        cells, markers = (anndata.io.read_elem(root[table]).index.astype(str) for table in ("obs", "var"))
        for what, names in (("cell", cells), ("marker", markers)):
            if names.has_duplicates:
                twice = names[names.duplicated()][0]
                raise InputError(f"predictions: {path} holds the {what} {twice} twice: name every {what} once")
        if array.ndim != 4 or array.shape[:2] != (len(cells), len(markers)):
            raise InputError(
                f"predictions: {name} of {path} have the shape {array.shape}: give (cells, markers, Y, X), here "
                f"({len(cells)}, {len(markers)}, Y, X) by its obs and var"
            )
        return Given(path, cells, tuple(markers), _provenance(root, path), array)

    def images(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Read some cells' images, (n, T, Y, X).

        Raises
        ------
        InputError
            Names a cell with pixels that are not finite: scores would leave it out, and so flatter.
        """
        found = read_rows(self.array, rows).astype(np.float32)
        whole = np.isfinite(found).all((1, 2, 3))
        if not whole.all():
            raise InputError(
                f"predictions: {self.path} holds pixels of the cell {self.obs_names[rows[~whole][0]]} that are not "
                "finite: predict every pixel"
            )
        return found


def _provenance(root: zarr.Group, path: Path) -> dict[str, Any]:
    if "uns/imgshared" not in root:
        return {}
    told = anndata.io.read_elem(root["uns/imgshared"])
    try:
        return dict(json.loads(told) if isinstance(told, str) else told)
    except (TypeError, ValueError) as error:
        raise InputError(
            f'predictions: uns["imgshared"] of {path} is neither JSON nor a dict: give run, store_hash and sources '
            "there, or leave it out"
        ) from error


class Stored:
    """Predictions that `imgshared predict`, or another tool, has written.

    Parameters
    ----------
    store
        The measured cells; those of other stores (training cells) are still predicted.
    path
        What `Given.open` opens. Its cells are found by their names in `store`; its crops are as large. Markers that it
        lacks are not judged. Cells that lack what these were predicted from (its `sources`, else the run's) need not
        be there, and are not judged.
    sharp
        Judge its ``sharp_images``.

    Raises
    ------
    InputError
        See `Given.open`; or the predictions do not belong to `store`, or are of markers that the model does not know.
    """

    def __init__(self, predict: Predict, run: Run, store: CellStore, path: Path, *, sharp: bool) -> None:
        self._predict, self._store, self._given = predict, store, Given.open(path, sharp=sharp)
        given = self._given
        if given.array.shape[2:] != (store.crop_px, store.crop_px):
            height, width = given.array.shape[2:]
            raise InputError(
                f"predictions: {path} has crops of {height} x {width} px and {store.path} of {store.crop_px} x "
                f"{store.crop_px} px: predict this store"
            )
        for marker in given.markers:
            if marker not in run.panel.markers:
                raise InputError(
                    f"predictions: {path} holds {marker!r}, which the model does not know."
                    f"{nearest(marker, run.panel.markers)}"
                )
        self._channels = run.panel.indices(given.markers)
        made_of = given.info.get("store_hash")
        if made_of is not None and made_of != store.data_hash:
            raise InputError(
                f"predictions: {path} was predicted from other cells than {store.path} holds now, though they may bear "
                "the same names. Predict this store again"
            )
        self._rows = given.obs_names.get_indexer(store.obs.index.astype(str))
        sources = [store.panel.find(marker) for marker in given.info.get("sources", run.sources)]
        able = store.measured[:, [c for c in sources if c is not None]].all(1)
        lacking = np.flatnonzero((self._rows < 0) & able)
        if len(lacking):
            raise InputError(
                f"predictions: {path} does not belong to {store.path}: {len(lacking):,} of {len(store):,} cells are "
                f"not in it (first: {store.obs.index[lacking[0]]}). Predict this store again"
            )

    def __call__(self, run: Run, store: CellStore, cells: NDArray[np.intp], **wishes: Any) -> PredictedCells:
        """Predict as `predict` does, but for the images to judge, which are read."""
        done = self._predict(run, store, cells, **wishes)
        if store.path != self._store.path:
            return done
        there = np.flatnonzero(self._rows[cells] >= 0)
        raw = torch.from_numpy(self._given.images(self._rows[cells[there]]))
        images, known = np.zeros_like(done.images["predicted"]), np.zeros_like(done.measured)
        images[there[:, None], self._channels] = run.normaliser.select(self._channels).forward(raw).numpy()
        known[there[:, None], self._channels] = known[:, run.panel.chromatin_index] = True
        return dataclasses.replace(
            done, images={**done.images, "predicted": images}, measured=done.measured & known, scale=None
        )
