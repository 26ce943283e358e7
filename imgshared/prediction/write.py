"""Predictions to disk: a new AnnData on Zarr, and OME-TIFF for a viewer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import tifffile
import torch
from numpy.typing import NDArray

from imgshared.config import PredictConfig
from imgshared.data.normalise import Normaliser
from imgshared.data.store import CellStore, StoreWriter, panel_table, put_in_place
from imgshared.methods.base import LatentMethod
from imgshared.prediction.cells import Progress, predict_batches
from imgshared.prediction.images import in_raw
from imgshared.prediction.run import Run
from imgshared.prediction.trust import Trust, load_trust
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
    ``predicted_scale`` (standard deviation a pixel), ``interval_images`` (half width of each pixel's 90% interval),
    ``sharp_images``, ``full_images`` and ``shared_images`` on request; from a method with latents ``obsm["X_shared"]``
    and ``obsm["X_<marker>"]``, the latents (of the sources, and specific; NaN where a marker is not measured; a slash
    in its name becomes _). With ``ome_tiff`` also ``<out>.ome/<image>.ome.tif``: the cells of an image as frames
    (TCYX), measured and predicted channels named.

    Where the run was calibrated (see `imgshared.prediction.trust`) and predicts from its usual sources, also
    ``layers["uncertainty"]`` (half width of the 90% interval of `X`), ``layers["abstain"]`` (better not predicted) and
    ``obs["ood"]`` (share of calibration cells with a less odd source; 1 is out of it all).

    Raises
    ------
    InputError
        Where the store breaks the model's contract, a marker is unknown, or `out` exists or is the store itself.
        Nothing is left behind.
    """
    config = config or PredictConfig()
    _refuse_unknown_wishes(run, config)
    given = run.source_mask(config.sources)
    targets = run.target_channels(config.markers, given)
    here, source = Path(out).resolve(), store.path.resolve()
    if here == source or here in source.parents or source in here.parents:
        raise InputError(
            f"{out} is, holds or lies in the store that is predicted: measured images are never overwritten"
        )
    trust = _trust(run, config)
    with ExitStack() as stack:
        writer = stack.enter_context(StoreWriter(out, overwrite=overwrite))
        folder = Path(f"{out}.ome")
        frames = (
            stack.enter_context(OmeFrames(run, store, targets, folder, overwrite, intervals=config.intervals))
            if config.ome_tiff
            else None
        )
        means, layers, odd = _predict_all(run, store, targets, config, trust, writer, frames, progress)
        if frames:
            frames.flush()  # all that may fill the disk comes before either folder gets its name
        writer.finish(
            store.obs if odd is None else store.obs.assign(ood=odd), panel_table(run.panel).iloc[targets], means,
            layers=layers,
            obsm={"spatial": store.obsm("spatial")}, info=_info(run, store, config),
        )  # fmt: skip
        if frames:
            frames.finish()
    return writer.path


def _predict_all(
    run: Run,
    store: CellStore,
    targets: Sequence[int],
    config: PredictConfig,
    trust: Trust | None,
    writer: StoreWriter,
    frames: OmeFrames | None,
    progress: Progress | None,
) -> tuple[Floats, dict[str, NDArray[Any]], NDArray[np.float64] | None]:
    """Write the images and latents batch by batch; return the cells' mean intensities, layers and oddness."""
    normaliser = run.normaliser.select(targets)
    means, layers, oddness, done = [], list[dict[str, NDArray[Any]]](), [], 0
    batches = predict_batches(
        run, store, np.arange(len(store)), sources=config.sources, full=config.full, shared=config.shared,
        sharp=config.sharp, batch_size=config.batch_size, targets=targets,
    )  # fmt: skip
    for part in batches:
        raw = {
            name: normaliser.inverse(torch.from_numpy(image[:, targets])).numpy() for name, image in part.images.items()
        }
        for name in raw.keys() - {"predicted", "sharp"}:
            raw[name] *= part.measured[:, targets, None, None]
        arrays = {f"{name}_images": image for name, image in raw.items()}
        guess = part.images["predicted"][:, targets]
        if part.scale is not None and config.scale:
            arrays["predicted_scale"] = _in_raw(guess, part.scale[:, targets], normaliser)
        if trust is not None and config.intervals:
            halves = np.stack([trust.pixels(part, c) for c in targets], 1)
            arrays["interval_images"] = _in_raw(guess, halves, normaliser)
        writer.append(
            **arrays,
            **({"X_shared": part.shared["sources"]} if part.shared else {}),
            **{f"X_{marker.replace('/', '_')}": z for marker, z in part.specific.items()},
        )
        means.append(_mean_in_mask(raw["predicted"], part.masks))
        layers.append({"measured": part.measured[:, targets]})
        if trust is not None:
            oddness.append(trust.odd(trust.describe(part, run.source_channel)))
            widths = [trust.pixels(part, c) for c in targets]
            spread = [trust.cells(means[-1][:, k], c) for k, c in enumerate(targets)]
            unsure = [trust.abstain(w.mean((1, 2)), oddness[-1], c) for w, c in zip(widths, targets, strict=True)]
            layers[-1] |= {"uncertainty": np.stack(spread, 1), "abstain": np.stack(unsure, 1)}
        if frames:
            frames.add(part, raw["predicted"], arrays.get("interval_images"))
        done += len(part.cells)
        if progress:
            progress(done, len(store))
    whole = {name: np.concatenate([each[name] for each in layers]) for name in layers[0]}
    return np.concatenate(means), whole, np.concatenate(oddness) if oddness else None


def _trust(run: Run, config: PredictConfig) -> Trust | None:
    """Return the run's calibration where it holds for these sources."""
    usual = run.source_mask(config.sources).equal(run.source_mask(None))
    trust = load_trust(run.path) if usual else None
    if config.intervals and trust is None:
        why = "has no validation group to calibrate on" if usual else "is calibrated for its usual sources alone"
        raise InputError(f"intervals=true: {run.path} {why}; leave it out")
    return trust


def _in_raw(mean: Floats, half: Floats, normaliser: Normaliser) -> Floats:
    m, h = torch.from_numpy(np.ascontiguousarray(mean)), torch.from_numpy(np.ascontiguousarray(half))
    return np.asarray(in_raw(m, h, normaliser).numpy(), np.float32)


def _refuse_unknown_wishes(run: Run, config: PredictConfig) -> None:
    name = run.experiment.method.name
    for wish in ("full", "shared"):
        if getattr(config, wish) and not isinstance(run.method, LatentMethod):
            raise InputError(f"{wish}=true: {name} has no latents to rebuild a stain from; leave it out")
    run.refuse_sharp(config.sharp)
    head = getattr(run.experiment.method, "head", getattr(run.experiment.method, "error", ""))
    if config.scale and head not in ("laplace", "gaussian"):
        raise InputError(
            f"scale=true: this {name} predicts no spread; train with method.head=laplace (translator) or "
            "method.error=laplace (regression)"
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
        "sources": [run.panel.markers[c] for c in run.source_mask(config.sources).nonzero()[:, 0].tolist()],
        "crop_px": store.crop_px,
        "pixel_size_um": store.pixel_size_um,
        "cells_by_split_of_the_model": {str(k): int(v) for k, v in parts.items()},
    }


class OmeFrames:
    """One OME-TIFF an image: cells are frames (T), channels the measured stains and the predicted ones, float32.

    On request also the half widths of the predictions' intervals.

    Written beside, into ``<folder>.partial``, and renamed by `finish`; left without it, nothing remains.

    Raises
    ------
    InputError
        Where the folder exists (without `overwrite`), or two images of the store would share a file.
    """

    def __init__(
        self, run: Run, store: CellStore, targets: Sequence[int], folder: Path, overwrite: bool, *, intervals: bool
    ) -> None:
        if folder.exists() and not overwrite:
            raise InputError(f"{folder} exists already: choose another name, or pass --overwrite to replace it")
        self.run, self.store, self.targets = run, store, targets
        self.folder, self.partial = folder, Path(f"{folder}.partial")
        kinds = ("predicted", "90% interval") if intervals else ("predicted",)
        self.names = [*run.panel.markers, *(f"{run.panel.markers[t]} ({kind})" for kind in kinds for t in targets)]
        self._images = store.obs["image"].astype(str).to_numpy()
        _refuse_shared_files(self._images)
        self._image: str | None = None
        self._frames: list[Floats] = []

    def __enter__(self) -> Self:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)  # gone already where finished

    def add(self, part: PredictedCells, predicted: Floats, intervals: Floats | None = None) -> None:
        """Append cells, which come image by image in the order of the store."""
        real = self.run.normaliser.inverse(torch.from_numpy(part.real)).numpy() * part.measured[..., None, None]
        images = self._images[part.cells]
        for image in dict.fromkeys(images):
            if image != self._image:
                self.flush()
                self._image = image
            rows = images == image
            shown = [real, predicted] if intervals is None else [real, predicted, intervals]
            self._frames.append(np.concatenate([x[rows] for x in shown], 1).astype(np.float32))

    def finish(self) -> None:
        """Give the folder its name."""
        put_in_place(self.partial, self.folder)

    def flush(self) -> None:
        """Write the image whose cells have come so far."""
        if self._image is None:
            return
        size = self.store.pixel_size_um
        physical = {"PhysicalSizeX": size, "PhysicalSizeY": size, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
        tifffile.imwrite(
            self.partial / _file_name(self._image), np.concatenate(self._frames), photometric="minisblack",
            compression="zlib",
            metadata={"axes": "TCYX", "Channel": {"Name": self.names}, **(physical if size else {})},
        )  # fmt: skip
        self._image, self._frames = None, []


def _file_name(image: str) -> str:
    return f"{image.replace('/', '_')}.ome.tif"


def _refuse_shared_files(images: NDArray[Any]) -> None:
    blocks = images[np.append(True, images[1:] != images[:-1])]  # an image whose cells are apart would come twice
    files, counts = np.unique([_file_name(image) for image in blocks], return_counts=True)
    if (counts > 1).any():
        raise InputError(
            f"ome_tiff: the store would fill {files[counts > 1][0]} twice: its images share a name, or their cells "
            "are not in one block"
        )
