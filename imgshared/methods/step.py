"""What one step of the translator has computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from imgshared.methods.draws import Stains
from imgshared.models.translation import Maps
from imgshared.types import Batch


@dataclass(frozen=True)
class Step:
    """What one step has computed of a batch and several terms share.

    Parameters
    ----------
    batch, stains
        The cells, and the stains of them that were drawn (visible and hidden).
    maps
        Of the encoded stains, `stains` at `encoded`.
    trunk
        (B, width, Y / r0, X / r0), the decoder's shared path from the fused maps of each cell's visible stains.
    """

    batch: Batch
    stains: Stains
    encoded: Tensor
    maps: Maps
    fused: Maps
    trunk: Tensor


@dataclass(frozen=True)
class Translated:
    """Images of stains that the cells did not show, for the adversarial, contrastive and cycle terms."""

    batch: Batch
    cells: Tensor
    channels: Tensor
    images: Tensor
