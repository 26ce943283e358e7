"""U-Nets: images to images of the same size, any size, with details passed along by skip connections."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgshared.models.pyramid import pad_to_multiple
from imgshared.types import InputError

DROPPED = 3  # innermost levels of pix2pix's decoder with dropout


class UNet(nn.Module):
    """U-Net of double 3x3 convolutions (Ronneberger, Fischer & Brox 2015, figure 1).

    As published: ReLU, 2x2 max-pooling on the way down, 2x2 transposed convolutions on the way up, skips, a linear 1x1
    convolution at the end. Unlike it: padded convolutions, so that the output is as large as the input, BatchNorm, and
    no dropout at the end of the way down (section 3.1). In evaluation every output pixel depends on its surroundings
    alone.

    Parameters
    ----------
    inputs, outputs
        Channels of the images.
    channels
        Of each level; every level but the first works at half the resolution of the one before.
    """

    def __init__(self, inputs: int, outputs: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.down = nn.ModuleList(_double(a, b) for a, b in pairwise([inputs, *channels]))
        upwards = list(pairwise(list(channels)[::-1]))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in upwards)
        self.up = nn.ModuleList(_double(2 * b, b) for _, b in upwards)
        self.last = nn.Conv2d(channels[0], outputs, 1)
        self.multiple = 2 ** (len(channels) - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Turn (B, inputs, Y, X) images into (B, outputs, Y, X) float32, unbounded."""
        h = pad_to_multiple(images, self.multiple)
        skips: list[Tensor] = []
        for level, layer in enumerate(self.down):
            h = layer(F.max_pool2d(h, 2) if level else h)
            skips.append(h)
        for grow, layer, skip in zip(self.grow, self.up, skips[-2::-1], strict=True):
            h = layer(torch.cat([skip, grow(h)], 1))
        with torch.autocast(h.device.type, enabled=False):  # bf16 would round an intensity near 1 to 1/128
            out: Tensor = self.last(h.float())
        return out[:, :, : images.shape[2], : images.shape[3]]


class StridedUNet(nn.Module):
    """The generator of pix2pix (Isola, Zhu, Zhou & Efros 2017, appendix 6.1.1): a U-Net of 4x4 stride-2 convolutions.

    As published: LeakyReLU 0.2 down, ReLU up, BatchNorm but on the first, innermost and last convolution, dropout after
    the innermost three levels of the decoder, weights from N(0, 0.02). Unlike it: the output is linear, for the paper's
    images lie in [-1, 1], the range of its tanh, and normalised stains in about [0, 1] and beyond.

    Parameters
    ----------
    inputs, outputs
        Channels of the images.
    channels
        Output channels of each convolution on the way down.
    dropout
        Probability; only while training.
    """

    def __init__(self, inputs: int, outputs: int, channels: Sequence[int], *, dropout: float = 0.5) -> None:
        super().__init__()
        depth, last = len(channels), len(channels) - 1
        self.down = nn.ModuleList(
            _Down(a, b, first=i == 0, norm=0 < i < last) for i, (a, b) in enumerate(pairwise([inputs, *channels]))
        )
        widths = [*channels[::-1][1:], outputs]
        skipped = [channels[-1], *(2 * n for n in widths[:-1])]  # all but the innermost take in a skip
        self.up = nn.ModuleList(
            _Up(a, b, norm=i < last, dropout=dropout if i < min(DROPPED, last) else 0.0)
            for i, (a, b) in enumerate(zip(skipped, widths, strict=True))
        )
        self.multiple = 2**depth
        self.apply(_start)

    def forward(self, images: Tensor) -> Tensor:
        """Turn (B, inputs, Y, X) images into (B, outputs, Y, X) float32, unbounded."""
        h = pad_to_multiple(images, self.multiple)
        skips: list[Tensor] = []
        for down in self.down:
            h = down(h)
            skips.append(h)
        for level, up in enumerate(self.up[:-1]):
            h = up(torch.cat([skips[-1 - level], h], 1) if level else h)
        h = torch.cat([skips[0], h], 1) if len(skips) > 1 else h
        with torch.autocast(h.device.type, enabled=False):  # as in `UNet`
            out: Tensor = self.up[-1](h.float())
        return out[:, :, : images.shape[2], : images.shape[3]]


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, first: bool, norm: bool) -> None:
        super().__init__()
        self.first = first
        self.convolution = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(outputs) if norm else None

    def forward(self, h: Tensor) -> Tensor:
        h = self.convolution(h if self.first else F.leaky_relu(h, 0.2))
        return self.norm(h) if self.norm is not None else h


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, norm: bool, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.convolution = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(outputs) if norm else None

    def forward(self, h: Tensor) -> Tensor:
        h = self.convolution(F.relu(h))
        h = self.norm(h) if self.norm is not None else h
        # not nn.Dropout: `Method.start` puts modules without trained parameters into evaluation
        return F.dropout(h, self.dropout, self.training) if self.dropout else h


def check_fits(crop_px: int, least: int, channels: Sequence[int]) -> None:
    """Refuse crops smaller than the `least` side that the levels of a U-Net need."""
    if crop_px < least:
        raise InputError(
            f"method.channels: a U-Net of {len(channels)} levels needs crops of at least {least} px, these have "
            f"{crop_px}: shorten it"
        )


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in (inputs, outputs):
        layers += [nn.Conv2d(n, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _start(layer: nn.Module) -> None:
    """Draw the weights as pix2pix does."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
