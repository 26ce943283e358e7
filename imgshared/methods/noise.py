"""What latent noise does to a prediction: the scale of methods whose decoders have learnt to bear it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from imgshared.types import Prediction


def fixed_noise(draws: int, latents: Tensor) -> list[Tensor]:
    """Return standard normal rows (S,) for (B, S) latents.

    They are the same for every cell and in every call, so that a prediction does not depend on its batch, and the
    scales of two cells can be compared.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(draws, latents.shape[1], generator=generator).to(latents)
    return list(noise)


def drawn(stains: Sequence[tuple[Tensor, Iterable[Tensor]]]) -> Prediction:
    """Put stains together, each a (B, 1, Y, X) image and what noise makes of it; the scale is the RMS deviation."""
    means, scales = [], []
    for mean, noisy in stains:
        squares = [(image - mean).square() for image in noisy]
        means.append(mean)
        scales += [torch.stack(squares).mean(0).sqrt()] if squares else []
    return Prediction(torch.cat(means, 1), torch.cat(scales, 1) if scales else None)
