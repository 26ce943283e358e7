"""The values that pass between the rooms of the package: small, frozen, without behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # `imgshared --help` needs no torch


class InputError(Exception):
    """Something the user gave cannot be used. The message names the culprit and says what to do."""


@dataclass(frozen=True)
class Batch:
    """A batch of cell crops on the training device.

    Parameters
    ----------
    index
        (B,) int64, position of each cell among the training cells (latent optimisation keys on it).
    images
        (B, C, Y, X) float, normalised to about [0, 1]; zero where a marker is not measured.
    measured
        (B, C) bool, which markers were stained in which cell.
    """

    index: Tensor
    images: Tensor
    measured: Tensor


@dataclass(frozen=True)
class Latents:
    """What a method knows of each cell.

    Parameters
    ----------
    shared
        (B, S) float, the latent that all stains of a cell share, fused over the measured stains.
    each
        (B, C, S) float, the same latent as each stain alone tells it; zero where the marker is not measured.
    specific
        (B, C, D) float, the latent of each marker; zero where the marker is not measured.
    measured
        (B, C) bool, where ``each`` and ``specific`` are known.
    """

    shared: Tensor
    each: Tensor
    specific: Tensor
    measured: Tensor


@dataclass(frozen=True)
class Prediction:
    """Predicted stains, T targets in the order asked, in normalised units.

    Parameters
    ----------
    mean
        (B, T, Y, X) float, the expected intensity.
    scale
        (B, T, Y, X) float > 0, the standard deviation that the method expects of each pixel; None without such a head.
    sharp
        Draws, when called, (B, T, Y, X) float, one image as it may look: the mean with texture that an expectation
        cannot have; None without such a head.
    """

    mean: Tensor
    scale: Tensor | None = None
    sharp: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class LossTerms:
    """A loss to minimise (scalar) and its named parts, detached, for the log.

    Parameters
    ----------
    total, parts
        The sum and what it is made of; parts may also hold what is only watched.
    count
        Of how many stains or cells this is the mean, where that is not the whole batch; 0: nothing could be judged.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    count: int | None = None
