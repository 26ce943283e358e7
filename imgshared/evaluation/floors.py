"""The two floors that a prediction must clear: a marker's mean picture, and linear regression on blurred chromatin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgshared.evaluation.features import blur

Floats = NDArray[np.float32]
SIGMAS = (0, 1, 2, 4, 8, 16, 32)  # px
PIXELS = 256  # of each crop that the regression is fitted on


class Floors:
    """Both floors of every marker, fitted on blocks of training cells; memory does not grow with their number.

    Parameters
    ----------
    channels
        Number of channels.
    chromatin
        The channel regressed on.
    ridge
        Penalty, relative to the mean squared feature, that keeps nearly equal blurs apart.
    seed
        Of the pixels that are drawn from each crop.
    """

    def __init__(self, channels: int, chromatin: int, *, ridge: float = 1e-5, seed: int = 0) -> None:
        self.chromatin = chromatin
        self.cells = np.zeros(channels, int)
        self._total: NDArray[Any] | None = None
        self._regressions = [BlurredRidge(ridge=ridge, seed=seed + c) for c in range(channels)]

    def add(self, images: Floats, measured: NDArray[np.bool_]) -> None:
        """Take in (n, C, Y, X) training crops and which markers were measured, (n, C)."""
        if self._total is None:
            self._total = np.zeros(images.shape[1:], np.float64)
        self._total += np.einsum("ncyx,nc->cyx", images, measured.astype(np.float32))
        self.cells += measured.sum(0)
        for channel, regression in enumerate(self._regressions):
            cells = measured[:, channel] & measured[:, self.chromatin]
            if channel != self.chromatin and cells.any():
                regression.add(images[cells, self.chromatin], images[cells, channel])

    def known(self, channel: int) -> bool:
        """Whether any training cell had this marker."""
        return bool(self.cells[channel])

    def marker_mean(self, channel: int) -> Floats:
        """Mean training crop, (Y, X): the best guess that knows the marker but not the cell."""
        assert self._total is not None
        return np.asarray(self._total[channel] / self.cells[channel], np.float32)

    def linear(self, channel: int, chromatin: Floats) -> Floats:
        """Predict a marker from (n, Y, X) chromatin crops."""
        return self._regressions[channel].predict(chromatin)


class BlurredRidge:
    """Ridge regression of a stain's pixel on the chromatin around it, as Gaussian blurs of 0 to 32 px and a constant.

    A blur wider than half the crop is left out. `add` blocks of cells, then `predict`: only the normal equations stay.
    """

    def __init__(self, sigmas: Sequence[float] = SIGMAS, *, ridge: float = 1e-5, pixels: int = PIXELS, seed: int = 0):
        self.sigmas, self.ridge, self.pixels = sigmas, ridge, pixels
        self._rng = np.random.default_rng(seed)
        self._xx: Any = 0.0
        self._xy: Any = 0.0

    def add(self, chromatin: Floats, stain: Floats) -> None:
        """Take in (n, Y, X) chromatin and stain crops of training cells."""
        x = self._blurs(chromatin).reshape(-1, chromatin[0].size, self._terms(chromatin))
        n, size = len(x), chromatin[0].size
        pixel = self._rng.integers(size, size=(n, min(self.pixels, size)))
        rows = np.take_along_axis(x, pixel[:, :, None], 1).reshape(-1, x.shape[2]).astype(np.float64)
        y = np.take_along_axis(stain.reshape(n, -1), pixel, 1).ravel().astype(np.float64)
        self._xx = self._xx + rows.T @ rows
        self._xy = self._xy + rows.T @ y

    def predict(self, chromatin: Floats) -> Floats:
        """Predict the stain of (n, Y, X) chromatin crops: (n, Y, X)."""
        penalty = self.ridge * np.trace(self._xx) / len(self._xx) * np.eye(len(self._xx))
        penalty[-1, -1] = 0  # the constant goes free
        weights = np.linalg.solve(self._xx + penalty, self._xy)
        return np.asarray(self._blurs(chromatin) @ weights.astype(np.float32), np.float32)

    def _fitting(self, images: Floats) -> list[float]:
        return [s for s in self.sigmas if 2 * s <= min(images.shape[-2:])]

    def _terms(self, images: Floats) -> int:
        return len(self._fitting(images)) + 1

    def _blurs(self, images: Floats) -> Floats:
        """(n, Y, X) to (n, Y, X, terms), the constant last."""
        return np.stack([*(blur(images, s) if s else images for s in self._fitting(images)), np.ones_like(images)], -1)
