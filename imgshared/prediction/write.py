"""Predictions to disk: a new AnnData on Zarr, and OME-TIFF for a viewer."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from imgshared.config import PredictConfig
from imgshared.data.normalise import Normaliser
from imgshared.data.place import refuse_source
from imgshared.data.store import CellStore, StoreWriter, panel_table, refuse_existing
from imgshared.methods.base import LatentMethod
from imgshared.prediction.cells import Progress, lack, predict_batches, predictable
from imgshared.prediction.doubts import other_scale, strange_cells
from imgshared.prediction.frames import OmeFrames, refuse_frames
from imgshared.prediction.images import in_raw
from imgshared.prediction.run import Run
from imgshared.prediction.trust import Trust, load_trust
from imgshared.prediction.types import Floats, PredictedCells
from imgshared.types import InputError


@dataclass(frozen=True)
class Job:
    """What is predicted of what, and how far it is calibrated."""

    run: Run
    store: CellStore
    targets: list[int]
    config: PredictConfig
    trust: Trust | None


class Block(NamedTuple):
    """Some cells' predictions: `obsm` arrays, and what ends in the small tables."""

    cells: NDArray[np.integer[Any]]
    arrays: dict[str, NDArray[Any]]
    means: Floats
    layers: dict[str, NDArray[Any]]
    odd: NDArray[np.float64] | None


def predict(
    run: Run,
    store: CellStore,
    out: Path,
    config: PredictConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Path:
    """Predict the cells of a store and write a new store; the measured images stay where they are.

    Cells that do not show what they would be predicted from (see `prediction.predictable`), as half of those that were
    never stained together, are left out of all that is written; `warn` is told how many and why. The others keep their
    names: ``cells[predictions.obs_names]`` are their measured stains. `warn` is also told of sources whose intensities
    have another scale than the training's, and where most cells are better not predicted; see `prediction.doubts`.

    Written: `obs` of those cells; `var` the predicted markers; `X` mean predicted intensity in each cell's mask;
    ``layers["measured"]``; ``obsm["predicted_images"]`` (N, T, Y, X) float32 in the raw units of the images, with
    ``predicted_scale`` (standard deviation a pixel), ``interval_images`` (half width of each pixel's 90% interval),
    ``sharp_images``, ``full_images`` and ``shared_images`` on request; from a method with latents ``obsm["X_shared"]``
    and ``obsm["X_<marker>"]``, the latents (of the sources, and specific; NaN where a marker is not measured; a slash
    in its name becomes _). With ``ome_tiff`` also ``<out>.ome/<image>.ome.tif``: the cells of an image as frames
    (TCYX), the measured channels and the predicted ones, ``<marker>_imputed``.

    Under torchrun each process predicts its share of the cells into ``<out>.part<rank>``, and the first one joins them.

    Where the run was calibrated (see `imgshared.prediction.trust`) and predicts from its usual sources, also
    ``layers["uncertainty"]`` (half width of the 90% interval of `X`), ``layers["abstain"]`` (better not predicted) and
    ``obs["ood"]`` (share of calibration cells with a less odd source; 1 is out of it all).

    Raises
    ------
    InputError
        Where the store breaks the model's contract, a marker is unknown, no cell can be predicted, or `out` exists or
        is the store itself. Nothing is left behind.
    """
    config = config or PredictConfig()
    _refuse_unknown_wishes(run, config)
    given = run.source_mask(config.sources)
    targets = run.target_channels(config.markers, given)
    fabric, frames = run.fabric, [Path(f"{out}.ome")] if config.ome_tiff else []
    refuse_source(store.path, [out, *frames, *_parts(out, fabric.world_size)], "store")
    refuse_existing(out, overwrite)
    for folder in frames:
        refuse_frames(store, folder, overwrite)
    cells = np.flatnonzero(predictable(run, store, config.sources))
    job = Job(run, store, targets, config, _trust(run, config, targets))
    if len(cells) < len(store) and fabric.is_global_zero:
        warn(
            f"{len(store) - len(cells):,} of {len(store):,} cells are left out: they {lack(run, config.sources)}, from "
            "which the others are predicted"
        )
    for text in other_scale(run, store, config.sources) if fabric.is_global_zero else ():
        warn(text)
    if fabric.world_size == 1:
        _write(job, _predicted(job, cells), out, cells, overwrite, progress)
    else:
        _write_shares(job, out, cells, overwrite, progress)
    if job.trust is not None and fabric.is_global_zero:
        written = CellStore(out)
        for text in strange_cells(run, written.obs["ood"].to_numpy(), written.layers()["abstain"], targets):
            warn(text)
    return out


def _write_shares(job: Job, out: Path, cells: NDArray[np.intp], overwrite: bool, progress: Progress | None) -> None:
    """Write the store where several processes predict, each its share of the cells, and the first one joins these."""
    config, fabric = job.config, job.run.fabric
    parts = _parts(out, fabric.world_size)
    refuse_existing(parts[fabric.global_rank], overwrite=True)  # before it would be removed at the end
    share = _shares(cells, config.batch_size, fabric.world_size)[fabric.global_rank]
    plain = replace(job, config=replace(config, ome_tiff=False))
    try:
        _write(plain, _predicted(job, share), parts[fabric.global_rank], share, True, progress)
        fabric.barrier()
        if fabric.is_global_zero:
            _write(job, _stored(parts, cells, config.batch_size), out, cells, overwrite, progress)
        fabric.barrier()
    finally:
        shutil.rmtree(parts[fabric.global_rank], ignore_errors=True)


def _parts(out: Path, ranks: int) -> list[Path]:
    """Where several processes write their shares."""
    return [Path(f"{out}.part{rank}") for rank in range(ranks)] if ranks > 1 else []


def _shares(cells: NDArray[np.intp], batch_size: int, ranks: int) -> list[NDArray[np.intp]]:
    """Cut the cells into as many runs of whole batches, in order; there may be empty ones."""
    batches = -(-len(cells) // batch_size)
    edges = [batch_size * (batches * rank // ranks) for rank in range(ranks + 1)]
    return [cells[a:b] for a, b in itertools.pairwise(edges)]


def _write(
    job: Job,
    blocks: Iterable[Block],
    out: Path,
    cells: NDArray[np.integer[Any]],
    overwrite: bool,
    progress: Progress | None,
) -> Path:
    """Write a store, and frames on request, of the blocks of some cells."""
    run, store, config, kept, done = job.run, job.store, job.config, list[Block](), 0
    with ExitStack() as stack:
        writer = stack.enter_context(StoreWriter(out, overwrite=overwrite))
        frames = None
        if config.ome_tiff:
            made = OmeFrames(run, store, job.targets, Path(f"{out}.ome"), overwrite, intervals=config.intervals)
            frames = stack.enter_context(made)
        for block in blocks:
            writer.append(**block.arrays)
            if frames:
                told = None if block.odd is None else np.column_stack([block.layers["abstain"], block.odd])
                frames.add(block.cells, block.arrays["predicted_images"], block.arrays.get("interval_images"), told)
            kept.append(block._replace(arrays={}))
            done += len(block.cells)
            if progress:
                progress(done, len(cells))
        if frames:
            frames.flush()  # all that may fill the disk comes before either folder gets its name
        obs = store.obs.iloc[cells]
        kept = kept or [_nothing(job)]
        odd = [block.odd for block in kept if block.odd is not None]
        writer.finish(
            obs.assign(ood=np.concatenate(odd)) if odd else obs, panel_table(run.panel).iloc[job.targets],
            np.concatenate([block.means for block in kept]),
            layers={name: np.concatenate([block.layers[name] for block in kept]) for name in kept[0].layers},
            obsm={"spatial": store.obsm("spatial")[cells]}, info=_info(run, store, config, cells),
        )  # fmt: skip
        if frames:
            frames.finish()
    return writer.path


def _nothing(job: Job) -> Block:
    """The block of no cells: what a process writes that has no share."""
    none = np.zeros((0, len(job.targets)))
    return Block(np.arange(0), {}, none.astype(np.float32), {"measured": none.astype(bool)}, None)


def _stored(parts: Sequence[Path], cells: NDArray[np.intp], batch_size: int) -> Iterator[Block]:
    """Read back the blocks that the processes have written of these cells, in order."""
    start = 0
    for part in map(CellStore, parts):
        layers, means = part.layers(), part.mean_intensity
        names = [name for name in part.obsm_names() if name != "spatial"]
        odd = part.obs["ood"].to_numpy() if "ood" in part.obs else None
        for first in range(0, len(part), batch_size):
            rows = slice(first, min(first + batch_size, len(part)))
            yield Block(
                cells[start + rows.start : start + rows.stop],
                {name: part.obsm(name, rows) for name in names},
                means[rows],
                {name: layer[rows] for name, layer in layers.items()},
                None if odd is None else odd[rows],
            )
        start += len(part)


def _predicted(job: Job, cells: NDArray[np.integer[Any]]) -> Iterator[Block]:
    """Predict some cells batch by batch."""
    config, targets = job.config, job.targets
    if not len(cells):
        return
    batches = predict_batches(
        job.run, job.store, cells, sources=config.sources, full=config.full, shared=config.shared,
        sharp=config.sharp, batch_size=config.batch_size, targets=targets,
    )  # fmt: skip
    for part in batches:
        yield _block(job, part)


def _block(job: Job, part: PredictedCells) -> Block:
    """Bring a batch to raw units, with what the calibration says of it."""
    targets, trust, normaliser = job.targets, job.trust, job.run.normaliser.select(job.targets)
    raw = {name: normaliser.inverse(torch.from_numpy(image[:, targets])).numpy() for name, image in part.images.items()}
    for name in raw.keys() - {"predicted", "sharp"}:
        raw[name] *= part.measured[:, targets, None, None]
    arrays = {f"{name}_images": image for name, image in raw.items()}
    guess = part.images["predicted"][:, targets]
    if part.scale is not None and job.config.scale:
        arrays["predicted_scale"] = _in_raw(guess, part.scale[:, targets], normaliser)
    widths = [] if trust is None else [trust.pixels(part, c) for c in targets]
    if job.config.intervals:
        arrays["interval_images"] = _in_raw(guess, np.stack(widths, 1), normaliser)
    if part.shared:
        arrays["X_shared"] = part.shared["sources"]
    arrays |= {f"X_{marker.replace('/', '_')}": z for marker, z in part.specific.items()}
    means, odd = _mean_in_mask(raw["predicted"], part.masks), None
    layers: dict[str, NDArray[Any]] = {"measured": part.measured[:, targets]}
    if trust is not None:
        odd = trust.odd(trust.describe(part, job.run.source_channel))
        spread = [trust.cells(means[:, k], c) for k, c in enumerate(targets)]
        unsure = [trust.abstain(w.mean((1, 2)), odd, c) for w, c in zip(widths, targets, strict=True)]
        layers |= {"uncertainty": np.stack(spread, 1), "abstain": np.stack(unsure, 1)}
    return Block(part.cells, arrays, means, layers, odd)


def _trust(run: Run, config: PredictConfig, targets: list[int]) -> Trust | None:
    """Return the run's calibration where it holds for these sources."""
    usual = run.source_mask(config.sources).equal(run.source_mask(None))
    trust = load_trust(run.path) if usual else None
    if not config.intervals:
        return trust
    if trust is None:
        why = "has no validation group to calibrate on" if usual else "is calibrated for its usual sources alone"
        raise InputError(f"intervals=true: {run.path} {why}; leave it out")
    refuse_uncalibrated(run, trust, targets)
    return trust


def refuse_uncalibrated(run: Run, trust: Trust, targets: Sequence[int]) -> None:
    """Refuse intervals of stains that have none.

    Raises
    ------
    InputError
        Names them, and those that have.
    """
    markers, known = run.panel.markers, [c for c in targets if not np.isnan(trust.pixel_half[c]).all()]
    unknown = ", ".join(markers[c] for c in targets if c not in known)
    if unknown:
        others = f"ask for markers=[{','.join(markers[c] for c in known)}], or " if known else ""
        raise InputError(
            f"intervals=true: {run.path} could not be calibrated: no validation cell shows {unknown} beside what it is "
            f"predicted from; {others}leave it out"
        )


def _in_raw(mean: Floats, half: Floats, normaliser: Normaliser) -> Floats:
    m, h = torch.from_numpy(np.ascontiguousarray(mean)), torch.from_numpy(np.ascontiguousarray(half))
    return np.asarray(in_raw(m, h, normaliser).numpy(), np.float32)


def _refuse_unknown_wishes(run: Run, config: PredictConfig) -> None:
    name = run.experiment.method.name
    for wish in ("full", "shared"):
        if getattr(config, wish) and not isinstance(run.method, LatentMethod):
            raise InputError(f"{wish}=true: {name} has no latents to rebuild a stain from; leave it out")
    run.refuse_sharp(config.sharp)
    if config.scale and not run.method.scaled:
        raise InputError(
            f"scale=true: this {name} predicts no spread; train with method.head=laplace (translator), method.error="
            "laplace (regression) or method.draws=8 (apollo, mvae), or make an ensemble of seeds"
        )


def _mean_in_mask(images: Floats, masks: NDArray[np.bool_]) -> Floats:
    area = np.maximum(masks.sum((1, 2)), 1)[:, None]
    return np.asarray(np.einsum("ncyx,nyx->nc", images, masks.astype(np.float32)) / area, np.float32)


def _info(run: Run, store: CellStore, config: PredictConfig, cells: NDArray[np.integer[Any]]) -> dict[str, Any]:
    parts = pd.Series(run.split.assign(store.obs.iloc[cells])).value_counts().to_dict()
    return {
        "kind": "predictions",
        "version": version("imgshared"),
        "run": str(run.path.resolve()),
        "checkpoint": run.checkpoint.name,
        "method": run.experiment.method.name,
        "seeds": run.seeds,
        "store": str(store.path.resolve()),
        "store_hash": store.data_hash,
        "sources": [run.panel.markers[c] for c in run.source_mask(config.sources).nonzero()[:, 0].tolist()],
        "cells_left_out": len(store) - len(cells),
        "crop_px": store.crop_px,
        "pixel_size_um": store.pixel_size_um,
        "cells_by_split_of_the_model": {str(k): int(v) for k, v in parts.items()},
    }
