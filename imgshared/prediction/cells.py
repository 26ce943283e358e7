"""Cells of a store: measured stains in, unmeasured stains and latents out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imgshared.data.feed import Feed
from imgshared.data.store import CellStore
from imgshared.methods.base import LatentMethod
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
    batch_size: int = 256,
    progress: Progress | None = None,
) -> PredictedCells:
    """Predict cells into memory, in normalised units; see `predict_batches` for large stores."""
    cells = np.arange(len(store)) if cells is None else np.asarray(cells)
    if not len(cells):
        raise InputError(f"{store.path}: no cells to predict")
    parts = []
    done = 0
    wishes = {"full": full, "shared": shared, "sharp": sharp}
    for part in predict_batches(run, store, cells, sources=sources, batch_size=batch_size, **wishes):  # type: ignore[arg-type]
        parts.append(part)
        done += len(part.cells)
        if progress:
            progress(done, len(cells))
    return _join(parts)


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
    full, shared, sharp
        Also these images; see `PredictedCells`.

    Raises
    ------
    InputError
        Where the store breaks the model's contract, a source is unknown, a cell has none of the sources, or the method
        has no sharp output.
    """
    chosen = run.source_mask(sources)
    run.refuse_sharp(sharp)
    needed = [m for m, c in zip(run.panel.markers, chosen, strict=True) if c]
    channels = run.contract.check(store, needed)
    device = run.fabric.device
    feed = Feed(store, cells, channels, run.normaliser, device, "stream", batch_size)
    shown = feed.measured[:, chosen]
    without = ~(shown.any(1) if run.method.sources is None else shown.all(1))
    if without.any():
        lack = f"{int(without.sum())} cells {'have none' if run.method.sources is None else 'lack some'} of the sources"
        raise InputError(f"{store.path}: {lack} measured ({', '.join(needed)})")
    start = 0
    for batch in feed.once(batch_size):
        rows = cells[start : start + len(batch.index)]
        start += len(rows)
        with run.fabric.autocast():
            images, shared_latents, specific_latents, scale = _infer(
                run, batch, chosen.to(device), range(len(channels)) if targets is None else targets, full, shared, sharp
            )
        yield PredictedCells(
            rows,
            _numpy(batch.images),
            batch.measured.cpu().numpy(),
            store.masks(rows),
            images,
            shared_latents,
            specific_latents,
            scale,
        )


def _infer(
    run: Run, batch: Batch, chosen: Tensor, targets: Sequence[int], full: bool, shared: bool, sharp: bool
) -> tuple[dict[str, Floats], dict[str, Floats], dict[str, Floats], Floats | None]:
    """Return images, shared latents and specific latents of a batch by name, and the predicted scale."""
    method, markers = run.method, run.panel.markers
    source = batch.measured & chosen
    prediction = method.translate(batch.images, source, targets)
    images = {"predicted": _in_place(prediction.mean, targets, len(markers))}
    if sharp and prediction.sharp is not None:
        images["sharp"] = _in_place(prediction.sharp, targets, len(markers))
    scale = None if prediction.scale is None else _numpy(_in_place(prediction.scale, targets, len(markers)))
    shared_latents: dict[str, Floats] = {}
    specific_latents: dict[str, Floats] = {}
    if isinstance(method, LatentMethod):
        for name, wanted in (("full", full), ("shared", shared)):
            if wanted:
                images[name] = method.reconstruct(batch.images, batch.measured, specific=name == "full")
        own = method.encode(batch.images, batch.measured)
        shared_latents["sources"] = _numpy(method.encode(batch.images, source).shared)
        for c, marker in enumerate(markers):
            known = batch.measured[:, c, None]
            shared_latents[marker] = _numpy(own.each[:, c].masked_fill(~known, torch.nan))
            if own.specific.shape[2]:
                specific_latents[marker] = _numpy(own.specific[:, c].masked_fill(~known, torch.nan))
    return {name: _numpy(image) for name, image in images.items()}, shared_latents, specific_latents, scale


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

    return PredictedCells(
        np.concatenate([p.cells for p in parts]),
        np.concatenate([p.real for p in parts]),
        np.concatenate([p.measured for p in parts]),
        np.concatenate([p.masks for p in parts]),
        joined("images"),
        joined("shared"),
        joined("specific"),
        np.concatenate([p.scale for p in parts if p.scale is not None]) if parts[0].scale is not None else None,
    )
