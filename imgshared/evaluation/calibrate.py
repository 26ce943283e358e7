"""Calibrate a trained run on its validation groups: imputability, intervals, oddness, when to abstain.

Group-aware: each group counts the same, and where there are several, intervals are widened until each group, held out
of the calibration in turn, is covered as often as promised on average (a jackknife+ over groups; Barber et al. 2021,
Dunn, Wasserman & Ramdas 2023 for calibration data in groups). One group tells nothing of differences between groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from imgshared.data.features import typical_radius
from imgshared.data.store import CellStore
from imgshared.evaluation.floors import Floors
from imgshared.evaluation.judgeable import Crops, sampled, seen, unpaired
from imgshared.prediction import Run, predict_batches
from imgshared.prediction.cells import Progress
from imgshared.prediction.trust import CLIP, FILE, Trust, describe_latent, describe_source, distance
from imgshared.prediction.types import Floats, PredictedCells

LEVEL = 0.9
OTHER_LEVELS = (0.5, 0.8, 0.95)  # for the reliability diagram
CELLS = 1500  # of training and of validation that are looked at, at most
BLOCK = 64
PIXELS = 128  # of each crop that the intervals are calibrated on
BINS, CELL_BINS = 16, 4  # of the driver, for pixels and for cells
RISK_BINS = 10  # of the cells by uncertainty
COMPONENTS = 16  # of the shared latent


def calibrate(run: Run, store: CellStore, progress: Progress | None = None) -> Path | None:
    """Write `trust.npz` into the run's folder; None where it has no validation group with its sources.

    What is newer than the weights is not computed again. Of several processes the first one writes.
    """
    path = run.path / FILE
    if path.exists() and path.stat().st_mtime_ns > run.checkpoint.stat().st_mtime_ns:
        return path
    shown = seen(run, store)
    train, val = sampled(run, store, shown, CELLS)
    if not len(val) or not len(train) or not run.fabric.is_global_zero:
        return None
    radius, done, total = typical_radius(store.masks(train)), 0, len(train) + len(val)

    def predicted(cells: NDArray[np.intp]) -> Iterator[PredictedCells]:
        nonlocal done
        for part in predict_batches(run, store, cells, full=False, shared=False, own_latents=False, batch_size=BLOCK):
            yield replace(part, measured=part.measured & shown[part.cells])
            done += len(part.cells)
            if progress:
                progress(done, total)

    floors, reference = _learn(run, unpaired(run, store, CELLS, shown=shown), predicted(train), radius)
    groups = store.obs[run.split.by].astype(str).to_numpy().astype(str)[val]
    _fit(run, predicted(val), groups, floors, radius, reference).save(path)
    return path


class Reference(NamedTuple):
    """What sources look like, see `Trust`."""

    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    precision: NDArray[np.float64]
    components: NDArray[np.float64]
    mean_latent: NDArray[np.float64]


def _learn(
    run: Run, others: Iterator[Crops], train: Iterator[PredictedCells], radius: float
) -> tuple[Floors, Reference]:
    """Return the floors, of others than the predicted cells, too, and what sources look like."""
    floors = Floors(len(run.panel), run.source_channels)
    latents, sources = [], []
    for images, measured in others:
        floors.add(images, measured)
    for done in train:
        floors.add(done.real, done.measured)
        sources.append(describe_source(done, run.source_channel, radius))
        latents += [done.shared["sources"]] if done.shared else []
    components, mean, z = np.zeros((0, 0)), np.zeros(0), np.concatenate(latents) if latents else None
    if z is not None:
        mean = z.mean(0, np.float64)
        components = np.linalg.svd(z - mean, full_matrices=False)[2][:COMPONENTS].T
    rows = np.hstack([np.vstack(sources), *describe_latent(z, components, mean)])
    centre, sd = rows.mean(0), rows.std(0)
    scale = np.where(sd > 1e-4 * (1 + np.abs(centre)), sd, 1.0)  # a feature that hardly varied is no measure
    fitted = LedoitWolf(assume_centered=True).fit(np.clip((rows - centre) / scale, -CLIP, CLIP))
    return floors, Reference(centre, scale, fitted.precision_, components, mean)


def _fit(
    run: Run,
    val: Iterator[PredictedCells],
    groups: NDArray[np.str_],
    floors: Floors,
    radius: float,
    reference: Reference,
) -> Trust:
    """Gather residuals on the validation cells, marker by marker, and make intervals of them."""
    count, chromatin = len(run.panel), run.panel.chromatin_index
    rng = np.random.default_rng(0)
    gathered: list[list[NDArray[np.float64]]] = [[] for _ in range(count)]
    at: list[list[NDArray[np.str_]]] = [[] for _ in range(count)]
    oddness, start = [], 0
    for done in val:
        here = groups[start : start + len(done.cells)]
        start += len(done.cells)
        source = describe_source(done, run.source_channel, radius)
        latent = describe_latent(done.shared.get("sources"), reference.components, reference.mean_latent)
        oddness.append(distance(np.hstack([source, *latent]), *reference[:3]))
        raw = in_raw(run, done)
        for channel in range(count):
            known = np.flatnonzero(done.measured[:, channel])
            if channel != chromatin and len(known) and floors.known(channel):
                gathered[channel].append(_residuals(done, channel, known, floors, raw[:, channel][known], rng))
                at[channel].append(here[known])
    shape = {"pixel": BINS, "cell": CELL_BINS}
    edges = {name: np.zeros((count, bins - 1), np.float32) for name, bins in shape.items()}
    levels = (LEVEL, *OTHER_LEVELS)
    half = {name: np.full((len(levels), count, bins), np.nan, np.float32) for name, bins in shape.items()}
    limit = np.full(count, np.inf, np.float32)
    for channel in range(count):
        if not gathered[channel]:
            continue
        table, own = np.concatenate(gathered[channel]), np.concatenate(at[channel])
        pixels = table[:, 4:].reshape(len(table), 2, -1)
        by = np.repeat(own, pixels.shape[2])
        for k, level in enumerate(levels):
            edges["pixel"][channel], half["pixel"][k, channel] = intervals(
                pixels[:, 0].ravel(), pixels[:, 1].ravel(), by, BINS, level
            )
            edges["cell"][channel], half["cell"][k, channel] = intervals(
                table[:, 0], table[:, 1], own, CELL_BINS, level
            )
        width = half["pixel"][0, channel][np.searchsorted(edges["pixel"][channel], pixels[:, 0])].mean(1)
        limit[channel] = risk_limit(width, table[:, 2] - table[:, 3])
    return Trust(
        LEVEL, len(np.unique(groups)), radius, edges["pixel"], half["pixel"][0], edges["cell"], half["cell"][0],
        np.array(OTHER_LEVELS), half["pixel"][1:], half["cell"][1:], limit,
        *reference[:3], np.sort(np.concatenate(oddness)), *reference[3:],
    )  # fmt: skip


def _residuals(
    done: PredictedCells,
    channel: int,
    known: NDArray[np.intp],
    floors: Floors,
    raw: Floats,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """One row a cell: predicted mean and its error (raw units), error of the picture and of the mean picture, then
    drivers and residuals of some pixels.
    """
    real, guess = done.real[known, channel], done.images["predicted"][known, channel]
    driver = guess if done.scale is None else done.scale[known, channel]
    flat = [x.reshape(len(known), -1) for x in (driver, np.abs(real - guess))]
    chosen = rng.integers(0, flat[0].shape[1], (len(known), PIXELS))
    some = [np.take_along_axis(x, chosen, 1) for x in flat]
    errors = [np.abs(real - x).mean((1, 2)) for x in (guess, floors.marker_mean(channel))]
    return np.column_stack([raw[:, 1], np.abs(raw[:, 0] - raw[:, 1]), *errors, *some]).astype(np.float64)


def in_raw(run: Run, done: PredictedCells) -> Floats:
    """Mean intensity in each cell's mask, raw units, (n, C, 2): measured and predicted."""
    area = np.maximum(done.masks.sum((1, 2)), 1)[:, None]
    means = [
        np.einsum("ncyx,nyx->nc", run.normaliser.inverse(torch.from_numpy(x)).numpy(), done.masks.astype(np.float32))
        / area
        for x in (done.real, done.images["predicted"])
    ]
    return np.stack(means, 2).astype(np.float32)


def intervals(
    driver: NDArray[np.float64],
    residual: NDArray[np.float64],
    groups: NDArray[np.str_],
    bins: int,
    level: float = LEVEL,
) -> tuple[Floats, Floats]:
    """Return edges (bins - 1,) of the driver and half widths (bins,) that cover `level` of the residuals.

    In each bin the quantile of the absolute residuals with every group counting the same; then all are widened by one
    factor until groups held out in turn are covered, on average, as promised.
    """
    edges = np.quantile(driver, np.linspace(0, 1, bins + 1)[1:-1])
    at = np.searchsorted(edges, driver)
    names = np.unique(groups)
    half = _halves(at, residual, groups, bins, level)
    if len(names) > 1:
        ratios = np.empty(len(residual))
        for name in names:
            mine = groups == name
            others = _halves(at[~mine], residual[~mine], groups[~mine], bins, level)
            ratios[mine] = residual[mine] / np.maximum(others[at[mine]], 1e-12)
        half = half * max(1.0, weighted_quantile(ratios, _weights(groups), level))
    return edges.astype(np.float32), half.astype(np.float32)


def risk_limit(width: NDArray[np.float64], loss: NDArray[np.float64]) -> float:
    """Return the uncertainty from which on a prediction loses, on average, against the mean picture; inf for never.

    `loss` is its error minus the mean picture's, a cell. Bins of cells by uncertainty are merged from the top as long
    as they lose.
    """
    order = np.argsort(width)
    limit = np.inf
    for rows in np.array_split(order, min(RISK_BINS, len(order)))[::-1]:
        if loss[rows].mean() < 0:
            break
        limit = float(width[rows].min())
    return limit


def weighted_quantile(values: NDArray[np.float64], weights: NDArray[np.float64], level: float) -> float:
    """Smallest value below which (and at which) `level` of the weight lies."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][min(np.searchsorted(total, level * total[-1]), len(values) - 1)])


def _halves(
    at: NDArray[np.intp], residual: NDArray[np.float64], groups: NDArray[np.str_], bins: int, level: float
) -> NDArray[np.float64]:
    whole = weighted_quantile(residual, _weights(groups), level)
    half = np.full(bins, whole)
    for k in np.unique(at):
        mine = at == k
        half[k] = weighted_quantile(residual[mine], _weights(groups[mine]), level)
    return half


def _weights(groups: NDArray[np.str_]) -> NDArray[np.float64]:
    """Every group counts the same."""
    _, code, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(1.0 / counts[code])
