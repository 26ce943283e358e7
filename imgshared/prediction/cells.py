"""Cells of a store: measured stains in, unmeasured stains and latents out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imgshared.data.feed import Feed
from imgshared.data.store import CellStore
from imgshared.methods.base import LatentMethod, Method
from imgshared.prediction.run import Run
from imgshared.prediction.types import Floats, PredictedCells
from imgshared.types import Batch, InputError

Progress = Callable[[int, int], None]


def predict_cells(
    run: Run,
    store: CellStore,
    cells: NDArray[np.integer[Any]] | None = None,
    *,
    sources: Sequence[str] | None = None,
    full: bool = True,
    shared: bool = True,
    sharp: bool = False,
    latents: bool = True,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> PredictedCells:
    """Predict cells, by default all that can be, into memory, in normalised units; see `predict_batches`."""
    cells = np.flatnonzero(predictable(run, store, sources)) if cells is None else np.asarray(cells)
    if not len(cells):
        raise InputError(f"{store.path}: no cells to predict")
    parts, done = list[PredictedCells](), 0
    batches = predict_batches(
        run, store, cells, sources=sources, full=full, shared=shared, sharp=sharp, latents=latents,
        batch_size=batch_size,
    )  # fmt: skip
    for part in batches:
        parts.append(part)
        done += len(part.cells)
        if progress:
            progress(done, len(cells))
    return _join(parts)


def predictable(run: Run, store: CellStore, sources: Sequence[str] | None = None) -> NDArray[np.bool_]:
    """Say which cells can be predicted, (N,): those that show what their prediction is made from.

    All of the sources for a method that is bound to some (see `predict_batches`), any of them for another.

    Raises
    ------
    InputError
        Where the store breaks the model's contract, a source is unknown, or no cell can be predicted.
    """
    chosen = run.source_mask(sources)
    names = [m for m, c in zip(run.panel.markers, chosen, strict=True) if c]
    channels = run.contract.check(store, names)
    shown = store.measured[:, [c for c, given in zip(channels, chosen, strict=True) if given and c is not None]]
    able = shown.any(1) if run.method.sources is None else shown.all(1)
    if not able.any():
        other = (
            " or name other sources=..." if run.method.sources is None else " for the model predicts from nothing else"
        )
        raise InputError(
            f"{store.path}: no cell can be predicted, all {len(store):,} {lack(run, sources)}: give other cells,{other}"
        )
    return np.asarray(able)


def lack(run: Run, sources: Sequence[str] | None = None) -> str:
    """Say what keeps cells from being predicted, e.g. ``do not show DNA``."""
    names = [m for m, c in zip(run.panel.markers, run.source_mask(sources), strict=True) if c]
    return lack_of(names, every=run.method.sources is not None)


def lack_of(names: Sequence[str], *, every: bool) -> str:
    """Say that cells lack some of the stains, where `every` one is needed, or all of them."""
    if len(names) == 1:
        return f"do not show {names[0]}"
    return f"{'lack some' if every else 'show none'} of {', '.join(names)}"


@torch.inference_mode()
def predict_batches(
    run: Run,
    store: CellStore,
    cells: NDArray[np.integer[Any]],
    *,
    sources: Sequence[str] | None = None,
    full: bool = True,
    shared: bool = True,
    sharp: bool = False,
    latents: bool = True,
    own_latents: bool = True,
    batch_size: int = 256,
    targets: Sequence[int] | None = None,
) -> Iterator[PredictedCells]:
    """Yield predictions batch by batch, so that memory does not grow with the store.

    Parameters
    ----------
    sources
        Markers to predict from; None is those that the method is bound to, else chromatin. A method that is bound to
        none predicts a cell that lacks some from those that it has.
    targets
        Channels to predict, the others stay zero; None is all.
    full, shared, sharp, latents
        Also these images, and the latents of a method that has some; see `PredictedCells`.
    own_latents
        Of these also those of each measured stain by itself, which cost the most; else the sources' alone.

    Raises
    ------
    InputError
        Where the store breaks the model's contract, a source is unknown, a cell cannot be predicted (see
        `predictable`), or the method has no sharp output.
    """
    run.refuse_sharp(sharp)
    without = int((~predictable(run, store, sources)[cells]).sum())
    if without:
        raise InputError(
            f"{store.path}: {without:,} of the {len(cells):,} cells asked for cannot be predicted, they "
            f"{lack(run, sources)}: leave them out, imgshared.prediction.predictable says which can be"
        )
    chosen, device = run.source_mask(sources), run.fabric.device
    channels = run.contract.check(store, ())
    feed = Feed(store, cells, channels, run.normaliser, device, "stream", batch_size)
    wishes = {"full": full, "shared": shared, "sharp": sharp}
    asked, start = range(len(channels)) if targets is None else targets, 0
    for batch in feed.once(batch_size):
        rows = cells[start : start + len(batch.index)]
        start += len(rows)
        with run.fabric.autocast():
            source = batch.measured & chosen.to(device)
            images, scale = _draw(run, batch, source, asked, wishes)
            shared_latents, specific_latents = _latents(run, batch, source, own_latents) if latents else ({}, {})
            error = _source_error(run.method, batch, source) if latents else None
        yield PredictedCells(
            rows,
            _numpy(batch.images),
            batch.measured.cpu().numpy(),
            store.masks(rows),
            images,
            shared_latents,
            specific_latents,
            scale,
            error,
        )


def _draw(
    run: Run, batch: Batch, source: Tensor, targets: Sequence[int], wishes: Mapping[str, bool]
) -> tuple[dict[str, Floats], Floats | None]:
    """Return images of a batch by name, and the predicted scale."""
    channels, method = source.shape[1], run.method
    prediction = run.translate(batch.images, source, targets)
    images = {"predicted": _in_place(prediction.mean, targets, channels)}
    if wishes["sharp"] and prediction.sharp is not None:
        images["sharp"] = _in_place(prediction.sharp(), targets, channels)
    for name in ("full", "shared"):
        if wishes[name] and isinstance(method, LatentMethod):
            images[name] = method.reconstruct(batch.images, batch.measured, specific=name == "full")
    scale = None if prediction.scale is None else _numpy(_in_place(prediction.scale, targets, channels))
    return {name: _numpy(image) for name, image in images.items()}, scale


def _latents(run: Run, batch: Batch, source: Tensor, each: bool) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return shared and specific latents of a batch by name; none from a method that has none."""
    shared, specific = dict[str, Floats](), dict[str, Floats]()
    if not isinstance(run.method, LatentMethod):
        return shared, specific
    shared["sources"] = _numpy(run.method.encode(batch.images, source).shared)
    if each:
        own = run.method.encode(batch.images, batch.measured)
        for c, marker in enumerate(run.panel.markers):
            known = batch.measured[:, c, None]
            shared[marker] = _numpy(own.each[:, c].masked_fill(~known, torch.nan))
            if own.specific.shape[2]:
                specific[marker] = _numpy(own.specific[:, c].masked_fill(~known, torch.nan))
    return shared, specific


def _source_error(method: Method, batch: Batch, source: Tensor) -> Floats | None:
    """Draw the sources again, each from its own shared latent: (B,) mean squared error."""
    if not isinstance(method, LatentMethod):
        return None
    again = method.reconstruct(batch.images, source, specific=False)
    error = (again.float() - batch.images.float()).square().mean((2, 3)) * source
    return _numpy(error.sum(1) / source.sum(1))


def _in_place(images: Tensor, targets: Sequence[int], channels: int) -> Tensor:
    """(B, T, Y, X) of the targets to (B, channels, Y, X), zero elsewhere."""
    out = images.new_zeros(len(images), channels, *images.shape[2:])
    out[:, list(targets)] = images
    return out


def _numpy(x: Tensor) -> Floats:
    return np.ascontiguousarray(x.float().cpu().numpy())


def _join(parts: Sequence[PredictedCells]) -> PredictedCells:
    def joined(name: str) -> dict[str, Floats]:
        return {key: np.concatenate([getattr(p, name)[key] for p in parts]) for key in getattr(parts[0], name)}

    def whole(name: str) -> Floats | None:
        each = [getattr(p, name) for p in parts]
        return None if each[0] is None else np.concatenate(each)

    return PredictedCells(
        np.concatenate([p.cells for p in parts]),
        np.concatenate([p.real for p in parts]),
        np.concatenate([p.measured for p in parts]),
        np.concatenate([p.masks for p in parts]),
        joined("images"),
        joined("shared"),
        joined("specific"),
        whole("scale"),
        whole("source_error"),
    )
