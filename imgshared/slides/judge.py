"""Which cells of a slide are better not predicted: judged as `predict` judges a store, on crops around the cells."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared.data.crops import Cells, cut
from imgshared.data.panel import Panel
from imgshared.data.readers import ImageFile
from imgshared.data.scan import Labelled
from imgshared.data.store import IMAGES, MASKS, CellStore, StoreWriter, panel_table
from imgshared.data.windows import read_labels
from imgshared.prediction.cells import predict_batches
from imgshared.prediction.trust import Trust
from imgshared.slides.damage import Damage
from imgshared.slides.job import Job


def judge(
    job: Job,
    trust: Trust,
    labels: ImageFile,
    cells: pd.DataFrame,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return how odd cells are (n,), 1 out of all that is known, and which predictions to abstain from (n, T).

    The crops, of the model's size and its sources alone, go through a store that is removed again: the disk holds them
    for the while, memory a tile. A cell whose crop leaves the slide cannot be judged: it is NaN, and abstained from.

    Parameters
    ----------
    cells
        (n, ...) with ascending ``label``, ``centroid_y_px``, ``centroid_x_px`` and ``area_px``.
    folder
        Of the store.
    """
    odd, unsure = np.full(len(cells), np.nan), np.ones((len(cells), len(job.targets)), bool)
    centroids = cells[["centroid_y_px", "centroid_x_px"]].to_numpy()
    side = job.run.contract.crop_px
    corners = np.rint(centroids - (side - 1) / 2).astype(np.int64)
    known = cells["label"].to_numpy(np.int64)
    none = np.zeros((len(cells), 0), np.float32)
    inside = np.all((corners >= 0) & (corners + side <= np.array(job.slide.shape)), axis=1)
    every = Cells(known, centroids, corners, cells["area_px"].to_numpy(np.int64), none).select(inside)
    if not len(every):
        return odd, unsure
    try:
        store, order = _store(job, labels, every, folder)
        rows = np.searchsorted(known, order)
        batches = predict_batches(job.run, store, np.arange(len(store)), targets=job.targets, full=False, shared=False)
        for part in batches:
            here, source = rows[part.cells], trust.describe(part, job.run.source_channel)
            odd[here] = trust.odd(source)
            for k, channel in enumerate(job.targets):
                unsure[here, k] = trust.abstain(trust.pixels(part, channel).mean((1, 2)), odd[here], channel)
            if progress:
                progress(int(part.cells[-1]) + 1, len(store))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return odd, unsure


def _store(job: Job, labels: ImageFile, cells: Cells, folder: Path) -> tuple[CellStore, NDArray[np.int64]]:
    """Cut crops of the sources into a store; return it, and the labels of its cells."""
    run, slide, order = job.run, job.slide, list[NDArray[np.int64]]()
    sources = [run.panel.markers[c] for c in job.sources]
    panel = Panel(tuple(dict.fromkeys([*sources, run.panel.chromatin])), run.panel.chromatin)
    damage = Damage(slide.shape, allowed=job.config.skip_damaged)
    with (
        StoreWriter(folder, overwrite=True) as writer,
        slide.reader(job.source_names) as reader,
        read_labels(labels.path) as label_of,
    ):
        read = damage.guard(reader, len(sources), slide.image.dtype)
        image = Labelled(read, label_of, slide.shape)
        for block, crops, own in cut(image, cells, run.contract.crop_px, mask_neighbours=False):
            unused = np.zeros((len(crops), len(panel) - len(sources), *crops.shape[2:]), crops.dtype)
            writer.append(**{IMAGES: np.concatenate([crops, unused], 1), MASKS: own})
            order.append(block.labels)
        ids = np.concatenate(order)
        given = np.zeros((len(ids), len(panel)), bool)
        given[:, : len(sources)] = True
        info: dict[str, Any] = {
            "kind": "cells",
            "crop_px": run.contract.crop_px,
            "pixel_size_um": run.contract.pixel_size_um,  # of the slide, too: it was held against it
            "dtype": str(slide.image.dtype),
        }
        obs = pd.DataFrame(index=pd.Index(ids.astype(str), name="cell_id"))
        means = np.zeros(given.shape, np.float32)
        writer.finish(obs, panel_table(panel), means, layers={"measured": given}, obsm={}, info=info)
    return CellStore(folder), ids
