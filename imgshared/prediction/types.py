"""What a trained model says of a set of cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PredictedCells:
    """Images in normalised units and latents of n cells; channels in the model's panel order.

    Parameters
    ----------
    cells
        (n,) int, rows of the store.
    real
        (n, C, Y, X), the measured stains; zero where not measured.
    measured
        (n, C) bool.
    masks
        (n, Y, X) bool, the nucleus.
    images
        Named predictions, each (n, C, Y, X): ``predicted`` (each marker from the sources alone), and where asked for
        ``sharp`` (the same with texture), ``full`` (each measured marker rebuilt from all of its latents) and
        ``shared`` (from its own shared latent).
        `full` and `shared` are zero where the marker is not measured.
    shared
        Shared latents, each (n, S): by the marker that they were encoded from, NaN where it is not measured,
        and ``sources``, from the sources fused; empty for a model without latents.
    specific
        Specific latents by marker, each (n, D), NaN where not measured; empty for a model without them.
    scale
        (n, C, Y, X), the standard deviation that the model expects of each predicted pixel; None without such a head.
    source_error
        (n,) mean squared error of the sources drawn again from their own shared latents; None without latents.
    """

    cells: NDArray[np.integer[Any]]
    real: Floats
    measured: NDArray[np.bool_]
    masks: NDArray[np.bool_]
    images: Mapping[str, Floats]
    shared: Mapping[str, Floats]
    specific: Mapping[str, Floats]
    scale: Floats | None = None
    source_error: Floats | None = None
