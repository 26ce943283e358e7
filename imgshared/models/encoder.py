"""Convolutional encoder whose last feature map is split by channel into a shared and a specific part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imgshared.types import InputError


class SplitEncoder(nn.Module):
    """One stain to its shared and its specific latent.

    4x4 stride-2 convolutions; the first `shared_channels` channels of the last map feed the shared head, the rest the
    specific head (apollo, Zhang et al. 2026: BatchNorm on all but the first layer, LeakyReLU 0.2).

    Parameters
    ----------
    crop_px
        Side of the input, divisible by ``2 ** len(channels)``.
    channels
        Output channels of each convolution.
    condition_dim
        Length of a condition (a marker's embedding) concatenated before the heads; 0 for none.
    outputs
        Values a latent dimension: 1 for a point, 2 for a mean and a log standard deviation.

    Raises
    ------
    InputError
        Where the crop cannot be halved that often, or the split leaves a head without channels.
    """

    def __init__(
        self,
        crop_px: int,
        channels: Sequence[int],
        shared_channels: int,
        shared_dim: int,
        specific_dim: int,
        *,
        condition_dim: int = 0,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        side = final_side(crop_px, channels)
        if not specific_dim:
            shared_channels = channels[-1]  # nothing to split off
        elif not 0 < shared_channels < channels[-1]:
            raise InputError(
                f"method.shared_channels = {shared_channels} must lie between 1 and {channels[-1] - 1}: "
                "the rest of the last convolution's channels feed the specific head"
            )
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(zip([1, *channels[:-1]], channels, strict=True)):
            layers.append(nn.Conv2d(n_in, n_out, 4, 2, 1, bias=False))
            if i > 0:
                layers.append(nn.BatchNorm2d(n_out))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.features = nn.Sequential(*layers)
        self.shared_channels, self.outputs = shared_channels, outputs
        n_shared, n_specific = (c * side**2 for c in (shared_channels, channels[-1] - shared_channels))
        self.shared_head = nn.Linear(n_shared + condition_dim, outputs * shared_dim)
        self.specific_head = nn.Linear(n_specific + condition_dim, outputs * specific_dim) if specific_dim else None

    def forward(self, images: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode (B, 1, Y, X) images, with (B, condition_dim) conditions, to (B, outputs * S) and (B, outputs * D)."""
        h = self.features(images)
        shared, specific = h[:, : self.shared_channels].flatten(1), h[:, self.shared_channels :].flatten(1)
        if condition is not None:
            shared, specific = torch.cat([shared, condition], 1), torch.cat([specific, condition], 1)
        z_s = self.shared_head(shared)
        return z_s, self.specific_head(specific) if self.specific_head is not None else z_s.new_zeros(len(z_s), 0)


def final_side(crop_px: int, channels: Sequence[int]) -> int:
    """Return the side of the last feature map, refusing crops that cannot be halved that often, to 2 px at least."""
    side, rest = divmod(crop_px, 2 ** len(channels))
    if rest or side < 2:  # BatchNorm needs more than one value of a channel, even where a batch has one stain
        fits = [n for n in range(1, len(channels)) if crop_px % 2**n == 0 and crop_px // 2**n > 1]
        raise InputError(
            f"crops of {crop_px} px cannot be halved {len(channels)} times, once for each of method.channels"
            + (f": use {fits[-1]}" if fits else "")
            + ", or prepare crops of another size"
        )
    return int(side)
