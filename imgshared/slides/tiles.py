"""Tiles of a slide whose predictions fit together without a seam: how far a network sees, and where tiles begin.

A tile is predicted with a margin as wide as the network sees, and begins at a multiple of its coarsest step: so it
equals its part of a prediction of the whole image. Networks that look at statistics of their input (instance
normalisation) see all of it; they predict windows of one size at places that do not depend on the tiles, which are
blended where they overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imgshared.data.windows import Span, within
from imgshared.methods.base import Method

STEP = 16  # px, the least step at which tiles begin
SIDES = (256, 512, 1024)  # px, of the images on which a network is asked how far it sees
PROBES = 5  # pixels that are changed, at different places of the coarsest step
CHANGE = 10.0  # by how much, normalised units: what is far off must not be lost in rounding
REPEATS, NOISE = 3, 4.0  # predictions of the same input, and how many times their greatest difference is noise
WINDOW, OVERLAP = 512, 128  # px, of blended windows

Floats = NDArray[np.float32]
Draw = Callable[[NDArray[Any]], Floats]  # raw (C, Y, X) to raw (T, Y, X)


def step_of(method: Method) -> int:
    """Pixels of the network's coarsest step, at least `STEP`."""
    known = [getattr(m, "multiple", None) for m in method.modules()]
    return max([STEP, *(k for k in known if isinstance(k, int))])


@torch.inference_mode()
def reach(method: Method, sources: torch.Tensor, targets: Sequence[int], *, sharp: bool = False) -> int | None:
    """Measure how far a pixel's influence goes: what changes in a prediction of noise where one pixel is changed.

    Parameters
    ----------
    sources
        (C,) bool.

    Returns
    -------
    Pixels, rounded up to the network's coarsest step; None where each pixel influences all of the image.
    """
    if method.global_statistics:
        return None
    step, device = step_of(method), sources.device
    draw = torch.Generator().manual_seed(0)

    def predict(images: torch.Tensor) -> torch.Tensor:
        prediction = method.translate(images, sources[None], targets)
        return (prediction.sharp() if sharp and prediction.sharp else prediction.mean)[0]

    for side in SIDES:
        images = torch.rand(1, len(sources), side, side, generator=draw).to(device) * sources[:, None, None]
        before, seen = predict(images), 0
        # On some devices the same input gives never quite the same output: what changes by itself is no influence.
        noise = NOISE * max(float((predict(images) - before).abs().max()) for _ in range(REPEATS))
        for place in (side // 2 + k * step // PROBES - step // 2 for k in range(PROBES)):
            changed = images.clone()
            changed[..., place, place] += CHANGE * sources
            where = ((predict(changed) - before).abs() > noise).any(0).nonzero()
            seen = max(seen, int((where - place).abs().max()) if len(where) else 0)
        if seen < side // 2 - step:
            return -(-max(seen, 1) // step) * step
    return None


@dataclass(frozen=True)
class Exact:
    """Predict a tile with a margin that makes it a part of the whole image's prediction.

    Parameters
    ----------
    draw
        Predicts (T, Y, X) of (C, Y, X) pixels.
    shape
        (Y, X) of the whole.
    margin, step
        How far the network sees, and its coarsest step, px.
    """

    draw: Draw
    shape: tuple[int, int]
    margin: int
    step: int

    def outer(self, tile: Span) -> Span:
        """The rows and columns that a tile is predicted from."""
        spans = []
        for here, side in zip(tile, self.shape, strict=True):
            start = max(0, here.start - self.margin)
            spans.append(slice(start - start % self.step, min(here.stop + self.margin, side)))
        return spans[0], spans[1]

    def reached(self, part: Span) -> Span:
        """The rows and columns whose prediction sees a part of the image."""
        y, x = (slice(max(0, p.start - self.margin), min(p.stop + self.margin, side)) for p, side in
                zip(part, self.shape, strict=True))  # fmt: skip
        return y, x

    def __call__(self, pixels: NDArray[Any], tile: Span) -> Floats:
        """(C, Y, X) pixels of `outer` to (T, y, x) of the tile."""
        rows, columns = (within(t, o) for t, o in zip(tile, self.outer(tile), strict=True))
        return self.draw(pixels)[:, rows, columns]


@dataclass(frozen=True)
class Blended:
    """Predict a tile from windows of one size at fixed places of the whole image, blended linearly where they overlap.

    Parameters
    ----------
    draw, shape
        See `Exact`.
    window, overlap
        Side of the windows, and how far neighbours overlap at least, px.
    """

    draw: Draw
    shape: tuple[int, int]
    window: int = WINDOW
    overlap: int = OVERLAP

    def outer(self, tile: Span) -> Span:
        """The rows and columns that a tile is predicted from."""
        spans = [self.along(here, side) for here, side in zip(tile, self.shape, strict=True)]
        return slice(spans[0][0].start, spans[0][-1].stop), slice(spans[1][0].start, spans[1][-1].stop)

    def reached(self, part: Span) -> Span:
        """The rows and columns whose prediction sees a part of the image: of all windows that touch it."""
        return self.outer(part)

    def __call__(self, pixels: NDArray[Any], tile: Span) -> Floats:
        """(C, Y, X) pixels of `outer` to (T, y, x) of the tile."""
        outer, whole = self.outer(tile), list[Floats]()
        weight = np.zeros([s.stop - s.start for s in tile], np.float32)
        rows, columns = (self.along(here, side) for here, side in zip(tile, self.shape, strict=True))
        for window in itertools.product(rows, columns):
            y, x = (within(w, o) for w, o in zip(window, outer, strict=True))
            drawn = self.draw(pixels[:, y, x])
            both = [slice(max(w.start, t.start), min(w.stop, t.stop)) for w, t in zip(window, tile, strict=True)]
            (y, x), into = ([within(b, of) for b, of in zip(both, span, strict=True)] for span in (window, tile))
            tents = [self._tent(w, side) for w, side in zip(window, self.shape, strict=True)]
            share = np.outer(tents[0][y], tents[1][x])
            whole = whole or [np.zeros((len(drawn), *weight.shape), np.float32)]
            whole[0][:, into[0], into[1]] += share * drawn[:, y, x]
            weight[into[0], into[1]] += share
        return np.asarray(whole[0] / weight)

    def along(self, here: slice, side: int) -> list[slice]:
        """The windows of one axis that touch `here`, in order."""
        if side <= self.window:
            return [slice(0, side)]
        count = 1 + -(-(side - self.window) // (self.window - self.overlap))
        starts = np.linspace(0, side - self.window, count).round().astype(int).tolist()
        return [slice(s, s + self.window) for s in starts if s < here.stop and here.start < s + self.window]

    def _tent(self, span: slice, side: int) -> Floats:
        """Weights along a window: rising over the overlap, but not at the image's own border."""
        place = np.arange(span.start, span.stop) + 0.5
        rise = np.where(span.start > 0, place - span.start, self.overlap)
        fall = np.where(span.stop < side, span.stop - place, self.overlap)
        return np.asarray(np.minimum(np.minimum(rise, fall), self.overlap) / self.overlap, np.float32)
