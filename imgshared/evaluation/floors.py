"""The two floors that a prediction must clear: a marker's mean picture, and linear regression on blurred sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imgshared.models.ridge import BlurredRidge, fitting

Floats = NDArray[np.float32]
SIGMAS = (0, 1, 2, 4, 8, 16, 32)  # px
PIXELS = 256  # of each crop that the regression is fitted on


class Floors:
    """Both floors of every marker, fitted on blocks of training cells; memory does not grow with their number.

    Parameters
    ----------
    channels
        Number of channels.
    sources
        The channels regressed on: what the model predicts from.
    ridge
        Penalty, relative to the mean squared feature, that keeps nearly equal blurs apart.
    seed
        Of the pixels that are drawn from each crop.
    """

    def __init__(self, channels: int, sources: Sequence[int], *, ridge: float = 1e-5, seed: int = 0) -> None:
        self.sources, self.ridge = list(sources), ridge
        self.cells = np.zeros(channels, int)
        self._total: NDArray[Any] | None = None
        self._regression: BlurredRidge | None = None
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, images: Floats, measured: NDArray[np.bool_], given: NDArray[np.bool_] | None = None) -> None:
        """Take in (n, C, Y, X) training crops and which markers were measured and count, (n, C).

        `given` (n,) says which cells show all sources, where `measured` does not.
        """
        if self._total is None or self._regression is None:
            self._total = np.zeros(images.shape[1:], np.float64)
            sigmas = fitting(SIGMAS, min(images.shape[2:]))
            self._regression = BlurredRidge(len(self.sources), images.shape[1], sigmas, ridge=self.ridge, pixels=PIXELS)
        self._total += np.einsum("ncyx,nc->cyx", images, measured.astype(np.float32))
        self.cells += measured.sum(0)
        cells = measured[:, self.sources].all(1) if given is None else given
        stains, shown = torch.from_numpy(images[cells]), torch.from_numpy(measured[cells])
        self._regression.add(self._regression.equations(stains[:, self.sources], stains, shown, self._generator))

    def known(self, channel: int) -> bool:
        """Whether any training cell had this marker."""
        return bool(self.cells[channel])

    def marker_mean(self, channel: int) -> Floats:
        """Mean training crop, (Y, X): the best guess that knows the marker but not the cell."""
        assert self._total is not None
        return np.asarray(self._total[channel] / self.cells[channel], np.float32)

    def linear(self, channel: int, images: Floats) -> Floats:
        """Predict a marker in (n, C, Y, X) crops, to (n, Y, X); by its mean picture where no cell showed both."""
        assert self._regression is not None
        if not self._regression.xx[channel].any():
            return np.broadcast_to(self.marker_mean(channel), (len(images), *images.shape[2:]))
        sources = torch.from_numpy(np.ascontiguousarray(images[:, self.sources], np.float32))
        return self._regression(sources, [channel])[:, 0].numpy()  # type: ignore[no-any-return]
