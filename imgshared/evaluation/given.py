"""Which images are judged: the mean prediction, the sharp one, or what a store of predictions holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from imgshared.config import EvaluateConfig
from imgshared.data.panel import nearest
from imgshared.data.store import CellStore
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


class Stored:
    """Predictions that `imgshared predict`, or another tool in the same format, has written.

    Parameters
    ----------
    store
        The measured cells; those of other stores (training cells) are still predicted.
    path
        An AnnData store whose obs names are the cells (and whose `store_hash`, where it has one, is the measured
        store's) and whose ``obsm["predicted_images"]`` (``sharp_images``) holds
        (N, T, Y, X) raw intensities of the markers of its `var`. Other markers are not judged. Cells that lack what
        these were predicted from (its `sources`, else the run's) need not be there, and are not judged.
    """

    def __init__(self, predict: Predict, run: Run, store: CellStore, path: Path, *, sharp: bool) -> None:
        self._predict, self._store, self._given = predict, store, CellStore(path)
        self._name = "sharp_images" if sharp else "predicted_images"
        if self._name not in self._given.obsm_names():
            raise InputError(f"predictions: {path} holds no {self._name}: give a store that `imgshared predict` wrote")
        if self._given.crop_px != store.crop_px:
            raise InputError(
                f"predictions: {path} has crops of {self._given.crop_px} px and {store.path} of {store.crop_px} px: "
                "predict this store"
            )
        for marker in self._given.markers:
            if marker not in run.panel.markers:
                raise InputError(
                    f"predictions: {path} holds {marker!r}, which the model does not know."
                    f"{nearest(marker, run.panel.markers)}"
                )
        self._channels = run.panel.indices(self._given.markers)
        names = pd.Index(self._given.obs.index.astype(str))
        if names.has_duplicates:
            twice = names[names.duplicated()][0]
            raise InputError(f"predictions: {path} holds the cell {twice} twice: every cell has one row")
        made_of = self._given.info.get("store_hash")
        if made_of is not None and made_of != store.data_hash:
            raise InputError(
                f"predictions: {path} was predicted from other cells than {store.path} holds now, though they may bear "
                "the same names. Predict this store again"
            )
        self._rows = names.get_indexer(store.obs.index.astype(str))
        sources = [store.panel.find(marker) for marker in self._given.info.get("sources", run.sources)]
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
        raw = torch.from_numpy(self._given.obsm(self._name, self._rows[cells[there]]).astype(np.float32))
        images, known = np.zeros_like(done.images["predicted"]), np.zeros_like(done.measured)
        images[there[:, None], self._channels] = run.normaliser.select(self._channels).forward(raw).numpy()
        known[there[:, None], self._channels] = known[:, run.panel.chromatin_index] = True
        return dataclasses.replace(
            done, images={**done.images, "predicted": images}, measured=done.measured & known, scale=None
        )
