"""One pass over the cells of a part: what the tables need is kept, the pictures are not, so memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared.data.features import Frame, central_frame, extent_features, frame, shape_features, stain_features
from imgshared.data.panel import Panel
from imgshared.data.store import CellStore
from imgshared.evaluation import fidelity
from imgshared.evaluation.checks import Bright, Maps, check
from imgshared.evaluation.floors import Floors
from imgshared.prediction.types import PredictedCells

BLOCK = 512  # cells predicted at a time
COMPARED = ("real", "predicted")  # whose morphology is compared
SEEN = ("real", "full", "shared", "predicted")  # pictures of a marker that a classifier may see
MEAN, LINEAR = "marker mean", "linear"
INPUTS = (*SEEN, "chromatin", MEAN)  # all that one may see

Predict = Callable[..., PredictedCells]
Progress = Callable[[str, int, int], None]


@dataclass
class Part:
    """The cells of one part of the split (training or test) and what was kept of them.

    Parameters
    ----------
    cells
        (n,) rows of the store.
    obs
        Their obs, in the same order.
    measured
        (n, C) bool.
    features
        (n, F) by (marker, input), what classifiers learn from, in one frame for all cells; the input ``chromatin``
        stands under the chromatin marker and holds the nuclear shape too; ``linear``, ``marker mean`` are floors. Zero
        rows where the marker is not measured.
    morphology
        (n, F) by (marker, input), of real and predicted stains and of the marker's mean training picture, about each
        cell's own outline: `morphology.NAMES`.
    crops
        (n, Y, X) float16 by (marker, input), only where a network is to read them.
    latents
        (n, D) by name, e.g. ``z_s [DNA]``, ``z_m [LaminB1]``; NaN where not measured.
    fidelity, checks
        See `fidelity.compare` and `checks.check`; `position` counts within this part.
    maps
        `checks.Maps` by marker.
    trust
        See `coverage.compare`; `position` counts within this part.
    """

    cells: NDArray[np.intp]
    obs: pd.DataFrame
    measured: NDArray[np.bool_]
    features: dict[tuple[str, str], NDArray[np.float32]] = field(default_factory=dict)
    morphology: dict[tuple[str, str], NDArray[np.float32]] = field(default_factory=dict)
    crops: dict[tuple[str, str], NDArray[np.float16]] = field(default_factory=dict)
    latents: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    fidelity: pd.DataFrame = field(default_factory=pd.DataFrame)
    checks: pd.DataFrame = field(default_factory=pd.DataFrame)
    maps: dict[str, Maps] = field(default_factory=dict)
    trust: pd.DataFrame = field(default_factory=pd.DataFrame)


def join(parts: Sequence[Part]) -> Part:
    """Put parts one after the other, but for the latents, which are of different models.

    A stain that a part lacks is zero there, as where it is not measured.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    starts = np.cumsum([0, *(len(p.cells) for p in parts)])

    def table(name: str) -> pd.DataFrame:
        each = [(getattr(p, name), start) for p, start in zip(parts, starts, strict=False) if len(getattr(p, name))]
        moved = [t.assign(position=t["position"] + start) for t, start in each]
        return pd.concat(moved, ignore_index=True) if moved else pd.DataFrame()

    maps: dict[str, Maps] = {}
    for marker, of in ((m, x) for p in parts for m, x in p.maps.items()):
        maps[marker] = maps[marker] + of if marker in maps else of

    def kept(name: str) -> dict[Any, Any]:
        whole: dict[Any, Any] = {}
        for p, start, end in zip(parts, starts, starts[1:], strict=False):
            for key, values in getattr(p, name).items():
                _rows(whole, key, int(starts[-1]), values.shape[1:], values.dtype)[start:end] = values
        return whole

    return Part(
        np.concatenate([p.cells for p in parts]),
        pd.concat([p.obs for p in parts]),
        np.concatenate([p.measured for p in parts]),
        kept("features"),
        kept("morphology"),
        kept("crops"),
        fidelity=table("fidelity"),
        checks=table("checks"),
        maps=maps,
        trust=table("trust"),
    )


def collect(
    predict: Predict,
    store: CellStore,
    panel: Panel,
    cells: NDArray[np.intp],
    *,
    fit: Floors | None = None,
    against: Floors | None = None,
    bright: Bright | None = None,
    trust: Callable[[PredictedCells], pd.DataFrame] | None = None,
    features: float | None = None,
    measure: Sequence[str] = INPUTS,
    crops: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Part:
    """Predict `cells` block by block and keep what is asked for.

    Parameters
    ----------
    predict
        Called with (cells, full=..., shared=...), returns `PredictedCells`.
    fit
        Floors that take these (training) cells in; all of them show what is predicted from.
    against
        Fitted floors to compare these (test) cells with; fills `Part.fidelity` and `Part.morphology`.
    bright
        Takes in the cells that `fit` takes; with `against`, fills `Part.checks` and `Part.maps`.
    trust
        Compares a block with its calibrated intervals; fills `Part.trust`.
    features
        Radius in px of the frame in which features are measured; None: no features.
    measure
        Of which inputs they are measured: of `INPUTS`, and with `against` ``linear``, that floor.
    crops
        Whether to keep the pictures of every input.
    """
    part = Part(cells, store.obs.iloc[cells], np.zeros((len(cells), len(panel)), bool))
    tables, trusted = [], []
    described = set(measure) if features is not None else set()
    rebuilt = crops or against is not None or bool(described & {"full", "shared"})
    for start, block in _blocks(cells):
        done = predict(block, full=rebuilt, shared=rebuilt)
        rows = slice(start, start + len(block))
        part.measured[rows] = done.measured
        _keep_latents(part, done, rows)
        if fit is not None:
            fit.add(done.real, done.measured, np.ones(len(block), bool))
            if bright is not None:
                bright.add(done.real, done.measured)
        if against is not None:
            tables.append(fidelity.compare(done, panel.markers, panel.chromatin_index, against))
            tables[-1]["position"] += start
            _keep_morphology(part, done, rows, panel, against)
            if bright is not None:
                _keep_checks(part, done, start, panel, bright)
        if trust is not None:
            within = trust(done)
            trusted += [within.assign(position=within["position"] + start)] if len(within) else []
        if features is not None:
            _keep_features(part, done, rows, panel, features, measure, against)
        if crops:
            for key, images in _inputs(done, panel):
                _rows(part.crops, key, len(cells), images.shape[1:], np.float16)[rows] = images
        if progress:
            progress(rows.stop, len(cells))
    if tables:
        part.fidelity = pd.concat(tables, ignore_index=True)
    if trusted:
        part.trust = pd.concat(trusted, ignore_index=True)
    floors = fit or against
    if floors is not None and features is not None and MEAN in measure:
        _keep_means(part, store, panel, floors, features)
    if floors is not None and crops:
        for marker, images in _pictures(panel, floors, len(cells)):
            part.crops[marker, MEAN] = np.broadcast_to(images[0].astype(np.float16), images.shape)
    return part


def _blocks(cells: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    for start in range(0, len(cells), BLOCK):
        yield start, cells[start : start + BLOCK]


def _inputs(done: PredictedCells, panel: Panel) -> Iterator[tuple[tuple[str, str], NDArray[np.float32]]]:
    """Yield ((marker, input), (n, Y, X) images) of each marker measured in any cell of the block."""
    yield (panel.chromatin, "chromatin"), done.real[:, panel.chromatin_index]
    for marker in panel.proteins:
        channel = panel.index(marker)
        if done.measured[:, channel].any():
            for name in SEEN:
                images = done.real if name == "real" else done.images.get(name)
                if images is not None:
                    yield (marker, name), images[:, channel]


def _keep_morphology(part: Part, done: PredictedCells, rows: slice, panel: Panel, floors: Floors) -> None:
    outline = frame(done.masks)
    inputs = {key: images for key, images in _inputs(done, panel) if key[1] in COMPARED}
    inputs |= {(m, MEAN): picture for m, picture in _pictures(panel, floors, len(done.cells)) if (m, "real") in inputs}
    for key, images in inputs.items():
        values = np.hstack([stain_features(images, outline), extent_features(images, outline)])
        _rows(part.morphology, key, len(part.cells), values.shape[1:], np.float32)[rows] = values


def _keep_checks(part: Part, done: PredictedCells, start: int, panel: Panel, bright: Bright) -> None:
    tables = [part.checks] if len(part.checks) else []
    for table, maps in check(done, panel.markers, panel.chromatin_index, bright):
        marker = table["marker"].iloc[0]
        tables.append(table.assign(position=table["position"] + start))
        part.maps[marker] = part.maps[marker] + maps if marker in part.maps else maps
    part.checks = pd.concat(tables, ignore_index=True) if tables else part.checks


def where(masks: NDArray[np.bool_], radius: float) -> Frame:
    """Return where the features of (n, Y, X) cells are measured that classifiers learn from: one frame for all."""
    return central_frame(len(masks), masks.shape[-1], radius)


def _keep_features(
    part: Part,
    done: PredictedCells,
    rows: slice,
    panel: Panel,
    radius: float,
    measure: Sequence[str],
    floors: Floors | None,
) -> None:
    inputs = {key: images for key, images in _inputs(done, panel) if key[1] in measure}
    if floors is not None and LINEAR in measure:
        known = [marker for marker, name in inputs if name == "real" and floors.known(panel.index(marker))]
        inputs |= {(marker, LINEAR): floors.linear(panel.index(marker), done.real) for marker in known}
    for key, images in inputs.items():
        values = stain_features(images, where(done.masks, radius))
        if key[1] == "chromatin":
            values = np.hstack([values, shape_features(done.masks)])
        _rows(part.features, key, len(part.cells), values.shape[1:], np.float32)[rows] = values


def _keep_means(part: Part, store: CellStore, panel: Panel, floors: Floors, radius: float) -> None:
    """Show the mean training picture of each marker in place of every cell's, on the same way: it must tell nothing."""
    for start, block in _blocks(part.cells):
        masks = store.masks(block)
        for marker, images in _pictures(panel, floors, len(block)):
            values = stain_features(images, where(masks, radius))
            kept = _rows(part.features, (marker, MEAN), len(part.cells), values.shape[1:], np.float32)
            kept[start : start + len(block)] = values


def _pictures(panel: Panel, floors: Floors, cells: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (marker, its mean training picture so many times) where it has one."""
    for marker in panel.proteins:
        if floors.known(panel.index(marker)):
            picture = floors.marker_mean(panel.index(marker))
            yield marker, np.broadcast_to(picture, (cells, *picture.shape))


def _keep_latents(part: Part, done: PredictedCells, rows: slice) -> None:
    for symbol, latents in (("z_s", done.shared), ("z_m", done.specific)):
        for name, values in latents.items():
            if name == "sources":
                continue  # predicted from chromatin alone, the fused latent is chromatin's
            _rows(part.latents, f"{symbol} [{name}]", len(part.cells), values.shape[1:], np.float32, np.nan)[rows] = (
                values
            )


def _rows(kept: dict[Any, Any], key: Any, n: int, tail: tuple[int, ...], dtype: Any, fill: float = 0) -> NDArray[Any]:
    """Return the array kept under a key, made on first sight."""
    if key not in kept:
        kept[key] = np.full((n, *tail), fill, dtype)
    array: NDArray[Any] = kept[key]
    return array
