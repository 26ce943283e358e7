"""Discriminator of overlapping patches, conditioned on the marker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from imgshared.types import InputError


class PatchDiscriminator(nn.Module):
    """Images to a map of logits, one a patch: high where it looks real (PatchGAN, Isola et al. 2017).

    4x4 convolutions with padding 1 and LeakyReLU 0.2, of stride 2 but for the last of `channels`, no norm on the first;
    then one of stride 1 to the logits. The published widths see patches of 70 px.

    Parameters
    ----------
    inputs
        Channels of an image.
    channels
        Output channels of each convolution but the last.
    markers
        How many stains to tell apart by projection (Miyato & Koyama 2018, eq. 3); 0 for no condition.
    norm
        "instance" (CycleGAN, without gains), "batch" (pix2pix) or "none" (the one to use with an R1 penalty).
    """

    def __init__(
        self,
        inputs: int,
        channels: Sequence[int] = (64, 128, 256, 512),
        *,
        markers: int = 0,
        norm: Literal["batch", "instance", "none"] = "instance",
    ) -> None:
        super().__init__()
        norms = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(zip([inputs, *channels[:-1]], channels, strict=True)):
            normed = i > 0 and norm in norms
            stride = 2 if i < len(channels) - 1 else 1
            layers.append(nn.Conv2d(n_in, n_out, 4, stride, 1, bias=not normed))  # a norm would cancel the bias
            if normed:
                layers.append(norms[norm](n_out))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.features = nn.Sequential(*layers)
        self.logit = nn.Conv2d(channels[-1], 1, 4, 1, 1)
        self.embedding = nn.Embedding(markers, channels[-1]) if markers else None
        self.apply(_start)

    def forward(self, images: Tensor, marker: Tensor | None = None) -> Tensor:
        """Judge (P, inputs, Y, X) images of (P,) int64 markers as (P, 1, y, x) logits."""
        h = self.features(images)
        logits: Tensor = self.logit(h)
        if self.embedding is None:
            return logits
        assert marker is not None, "a conditioned discriminator needs the markers"
        # each logit sees 4x4 features with padding 1: the mean of the inner 2x2 are the features at its position
        centres = F.avg_pool2d(h, 2, stride=1)
        weights: Tensor = self.embedding(marker)[:, :, None, None]
        return logits + (weights * centres).sum(1, keepdim=True)


def receptive_field(channels: Sequence[int]) -> int:
    """Return the side in pixels of the patch that a logit judges."""
    side = 1
    for stride in _strides(channels)[::-1]:
        side = (side - 1) * stride + 4
    return side


def check_fits(crop_px: int, channels: Sequence[int]) -> None:
    """Refuse crops smaller than the patch that a logit judges: it would judge the padding."""
    if crop_px < receptive_field(channels):
        fitting = [n for n in range(1, len(channels)) if receptive_field(channels[:n]) <= crop_px]
        raise InputError(
            f"method.discriminator_channels: {len(channels)} convolutions judge patches of {receptive_field(channels)} "
            f"px, larger than the crops of {crop_px} px: "
            + (f"name {fitting[-1]}" if fitting else "prepare larger crops")
        )


def _strides(channels: Sequence[int]) -> list[int]:
    return [2] * (len(channels) - 1) + [1, 1]


def _start(layer: nn.Module) -> None:
    """Draw the weights as pix2pix does; the embedding alike, since at 0 the condition would be slow to matter."""
    if isinstance(layer, nn.Conv2d | nn.Embedding):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
    if isinstance(layer, nn.Conv2d) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
