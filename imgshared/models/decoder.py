"""Convolutional decoder from a latent vector to the logits of one stain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imgshared.models.encoder import final_side


class LatentDecoder(nn.Module):
    """A latent (and a condition) to an image: the mirror of `SplitEncoder`.

    A linear layer with ReLU, then 4x4 stride-2 transposed convolutions with BatchNorm and LeakyReLU 0.2
    (apollo, Zhang et al. 2026).

    Parameters
    ----------
    crop_px
        Side of the output.
    channels
        Those of the encoder, in its order.
    latent_dim, condition_dim
        Length of the latent and of the condition concatenated to it (0 for none).
    """

    def __init__(self, crop_px: int, channels: Sequence[int], latent_dim: int, *, condition_dim: int = 0) -> None:
        super().__init__()
        self.side, self.width = final_side(crop_px, channels), channels[-1]
        self.expand = nn.Sequential(
            nn.Linear(latent_dim + condition_dim, self.width * self.side**2), nn.ReLU(inplace=True)
        )
        layers: list[nn.Module] = []
        down = list(channels)[::-1]
        for n_in, n_out in itertools.pairwise(down):
            layers += [
                nn.ConvTranspose2d(n_in, n_out, 4, 2, 1, bias=False),
                nn.BatchNorm2d(n_out),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.ConvTranspose2d(down[-1], 1, 4, 2, 1))
        self.grow = nn.Sequential(*layers)

    def forward(self, latent: Tensor, condition: Tensor | None = None) -> Tensor:
        """Decode (B, latent_dim) latents to (B, 1, Y, X) logits."""
        if condition is not None:
            latent = torch.cat([latent, condition], 1)
        h = self.expand(latent).reshape(-1, self.width, self.side, self.side)
        return self.grow(h.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]
