"""Predictions to disk: a new AnnData on Zarr, and OME-TIFF for a viewer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
import torch
from numpy.typing import NDArray

from imgshared.config import PredictConfig
from imgshared.data.store import CellStore, StoreWriter, panel_table
from imgshared.prediction.cells import Progress, predict_batches
from imgshared.prediction.run import Run
from imgshared.prediction.types import Floats, PredictedCells
from imgshared.types import InputError


def predict(
    run: Run,
    store: CellStore,
    out: Path,
    config: PredictConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Predict every cell of a store and write a new store; the measured images stay where they are.

    Written: `obs` of the store; `var` the predicted markers; `X` mean predicted intensity in each cell's mask;
    ``layers["measured"]``; ``obsm["predicted_images"]`` (N, T, Y, X) float32 in the raw units of the images, with
    ``full_images`` and ``shared_images`` on request; ``obsm["X_shared"]`` and ``obsm["X_<marker>"]``, the latents
    (of the sources, and specific; NaN where a marker is not measured). With ``ome_tiff`` also
    ``<out>.ome/<image>.ome.tif``, the cells of an image as frames (TCYX), measured and predicted channels named.

    Raises
    ------
    InputError
        Where the store breaks the model's contract, a marker is unknown, or `out` exists.
    """
    config = config or PredictConfig()
    names = config.markers or run.panel.proteins
    targets = run.panel.indices(names)
    writer = StoreWriter(out, overwrite=overwrite)
    frames = OmeFrames(run, store, targets, Path(f"{out}.ome")) if config.ome_tiff else None
    normaliser = run.normaliser.select(targets)
    means: list[Floats] = []
    measured: list[NDArray[np.bool_]] = []
    done = 0
    batches = predict_batches(
        run, store, np.arange(len(store)), sources=config.sources, full=config.full, shared=config.shared,
        batch_size=config.batch_size,
    )  # fmt: skip
    for part in batches:
        raw = {
            name: normaliser.inverse(torch.from_numpy(image[:, targets])).numpy() for name, image in part.images.items()
        }
        for name in raw.keys() - {"predicted"}:
            raw[name] *= part.measured[:, targets, None, None]
        writer.append(
            **{f"{name}_images": image for name, image in raw.items()},
            X_shared=part.shared["sources"],
            **{f"X_{marker}": z for marker, z in part.specific.items()},
        )
        means.append(_mean_in_mask(raw["predicted"], part.masks))
        measured.append(part.measured[:, targets])
        if frames:
            frames.add(part, raw["predicted"])
        done += len(part.cells)
        if progress:
            progress(done, len(store))
    if frames:
        frames.close()
    return writer.finish(
        store.obs,
        panel_table(run.panel).iloc[targets],
        np.concatenate(means),
        layers={"measured": np.concatenate(measured)},
        obsm={"spatial": store.obsm("spatial")},
        info=_info(run, store, config),
    )


def _mean_in_mask(images: Floats, masks: NDArray[np.bool_]) -> Floats:
    area = np.maximum(masks.sum((1, 2)), 1)[:, None]
    return np.asarray(np.einsum("ncyx,nyx->nc", images, masks.astype(np.float32)) / area, np.float32)


def _info(run: Run, store: CellStore, config: PredictConfig) -> dict[str, Any]:
    parts = pd.Series(run.split.assign(store.obs)).value_counts().to_dict()
    return {
        "kind": "predictions",
        "version": version("imgshared"),
        "run": str(run.path.resolve()),
        "checkpoint": run.checkpoint.name,
        "method": run.experiment.method.name,
        "store": str(store.path.resolve()),
        "store_hash": store.data_hash,
        "sources": list(config.sources or [run.panel.chromatin]),
        "crop_px": store.crop_px,
        "pixel_size_um": store.pixel_size_um,
        "cells_by_split_of_the_model": {str(k): int(v) for k, v in parts.items()},
    }


class OmeFrames:
    """One OME-TIFF an image: cells are frames (T), channels the measured stains and the predicted ones, float32."""

    def __init__(self, run: Run, store: CellStore, targets: Sequence[int], folder: Path) -> None:
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} exists already: remove it, or predict to another name")
        folder.mkdir(parents=True, exist_ok=True)
        self.run, self.store, self.targets, self.folder = run, store, targets, folder
        self.names = [*run.panel.markers, *(f"{run.panel.markers[t]} (predicted)" for t in targets)]
        self._image: str | None = None
        self._frames: list[Floats] = []

    def add(self, part: PredictedCells, predicted: Floats) -> None:
        """Append cells, which come image by image in the order of the store."""
        real = self.run.normaliser.inverse(torch.from_numpy(part.real)).numpy() * part.measured[..., None, None]
        images = self.store.obs["image"].astype(str).to_numpy()[part.cells]
        for image in dict.fromkeys(images):
            if image != self._image:
                self.close()
                self._image = image
            rows = images == image
            self._frames.append(np.concatenate([real[rows], predicted[rows]], 1).astype(np.float32))

    def close(self) -> None:
        """Write the image at hand."""
        if self._image is None:
            return
        size = self.store.pixel_size_um
        physical = {"PhysicalSizeX": size, "PhysicalSizeY": size, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
        path = self.folder / f"{self._image.replace('/', '_')}.ome.tif"
        tifffile.imwrite(
            path, np.concatenate(self._frames), photometric="minisblack", compression="zlib",
            metadata={"axes": "TCYX", "Channel": {"Name": self.names}, **(physical if size else {})},
        )  # fmt: skip
        self._image, self._frames = None, []
