"""Encoders from one stain to a pyramid of feature maps: this project's own, or a timm backbone."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgshared.types import InputError


class Block(nn.Module):
    """``x + conv(act(conv(act(norm(x)))))``, 3x3 convolutions; the last starts small: a deep stack starts as identity.

    BatchNorm keeps long trainings with large steps from diverging. Its statistics are the batch's in training alone: in
    evaluation they are constants, so a tile is drawn like the slide that it was cut from.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(width, width, 3, 1, 1) for _ in range(2))
        self.norm = nn.BatchNorm2d(width)
        nn.init.kaiming_normal_(self.first.weight, 0.2)
        nn.init.normal_(self.last.weight, std=1e-3)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, Y, X) to the same."""
        h = F.leaky_relu(self.norm(x), 0.2)
        return x + self.last(F.leaky_relu(self.first(h), 0.2))  # type: ignore[no-any-return]


class Condition(nn.Module):
    """Scale and shift the channels of maps by a marker's embedding (Perez et al. 2018); starts as the identity."""

    def __init__(self, marker_dim: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(marker_dim, 2 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, marker: Tensor) -> Tensor:
        """(P, width, Y, X) maps and (P, marker_dim) embeddings to maps."""
        scale, shift = self.linear(marker)[:, :, None, None].to(x.dtype).chunk(2, 1)
        return x * (1 + scale) + shift  # type: ignore[no-any-return]


class NoCondition(nn.Module):
    """Maps as they are, whatever the marker."""

    def forward(self, x: Tensor, marker: Tensor | None) -> Tensor:
        """(P, width, Y, X) maps to the same."""
        return x


class ConvPyramid(nn.Module):
    """Maps at 1/2, 1/4, ... of the resolution: a 2x2 step down and a residual block a level.

    Parameters
    ----------
    channels
        Width of each level.
    inputs
        Channels of the image.
    marker_dim
        Length of a marker's embedding, which scales and shifts what enters the residual block of each level, and so
        reaches all coarser levels; 0 for no condition.
    """

    def __init__(self, channels: Sequence[int], *, inputs: int = 1, marker_dim: int = 0) -> None:
        super().__init__()
        self.reductions = tuple(2 ** (level + 1) for level in range(len(channels)))
        stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * inputs, channels[0], 3, 1, 1))
        steps = [nn.Conv2d(a, b, 2, 2) for a, b in itertools.pairwise(channels)]
        self.steps = nn.ModuleList([stem, *steps])
        self.conditions = _conditions(marker_dim, channels)
        self.blocks = nn.ModuleList([Block(width) for width in channels])

    def forward(self, images: Tensor, code: Tensor | None = None) -> list[Tensor]:
        """(P, inputs, Y, X), Y and X multiples of the last reduction, to one (P, width, Y / r, X / r) map a level.

        `code`, the (P, marker_dim) embeddings, is not looked at without a condition.
        """
        maps, h = [], images
        for step, condition, block in zip(self.steps, self.conditions, self.blocks, strict=True):
            h = block(condition(step(h), code))
            maps.append(h)
        return maps


class TimmPyramid(nn.Module):
    """The first levels of a timm backbone, each brought to the wanted width by a 1x1 convolution.

    A marker's embedding conditions these outputs alone: the backbone itself reads every stain alike. Some backbones
    look at statistics of their input (squeeze-and-excitation, GroupNorm), unlike `ConvPyramid`. The weights are not
    pretrained.

    Raises
    ------
    InputError
        Where timm knows no such model (the nearest is named), it gives no pyramid, one of fewer levels, or takes images
        of one size alone.
    """

    def __init__(self, name: str, channels: Sequence[int], *, inputs: int = 1, marker_dim: int = 0) -> None:
        super().__init__()
        import timm  # slow to import, and only needed here

        known = timm.list_models()
        architecture = name.partition(".")[0]  # what follows the dot names pretrained weights
        if architecture not in known:
            near = difflib.get_close_matches(architecture, known, n=1, cutoff=0.4)
            raise InputError(
                f"method.backbone: timm knows no model {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")
            )
        levels = tuple(range(len(channels)))
        try:
            self.body = timm.create_model(
                name, pretrained=False, features_only=True, in_chans=inputs, out_indices=levels
            )
        except (RuntimeError, AttributeError, TypeError) as error:
            raise InputError(f"method.backbone: {name} gives no pyramid of features ({error})") from error
        except (IndexError, AssertionError) as error:  # as timm says it of either kind of model
            raise InputError(f"method.channels has {len(channels)} levels, more than {name}: name fewer") from error
        info: Any = self.body.feature_info
        self.reductions = tuple(info.reduction())
        if not self._takes_any_size(4 * self.reductions[-1], inputs):
            raise InputError(
                f"method.backbone: {name} takes images of its own size alone: name a convolutional one, e.g. resnet10t"
            )
        self.project = nn.ModuleList([nn.Conv2d(a, b, 1) for a, b in zip(info.channels(), channels, strict=True)])
        self.conditions = _conditions(marker_dim, channels)

    def forward(self, images: Tensor, code: Tensor | None = None) -> list[Tensor]:
        """As `ConvPyramid.forward`."""
        levels = zip(self.body(images), self.project, self.conditions, strict=True)
        return [condition(project(h), code) for h, project, condition in levels]

    @torch.no_grad()
    def _takes_any_size(self, side: int, inputs: int) -> bool:
        self.body.eval()
        try:
            maps = self.body(torch.zeros(1, inputs, side, side))
        except (AssertionError, RuntimeError):  # as timm's transformers say it
            return False
        self.body.train()
        return all(h.shape[2:] == (side // r, side // r) for h, r in zip(maps, self.reductions, strict=True))


class UpPath(nn.Module):
    """From a pyramid of maps to one map at the finest level: up, add the level's own map, a residual block.

    Parameters
    ----------
    inputs
        Width of each level of the pyramid.
    channels
        Width of the path at each level.
    reductions
        Of the pyramid.
    """

    def __init__(self, inputs: Sequence[int], channels: Sequence[int], reductions: Sequence[int]) -> None:
        super().__init__()
        self.factors = [b // a for a, b in itertools.pairwise(reductions)]
        self.lateral = nn.ModuleList([nn.Conv2d(a, b, 1) for a, b in zip(inputs, channels, strict=True)])
        self.blocks = nn.ModuleList([Block(width) for width in channels])
        self.down = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in itertools.pairwise(channels)])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """One (B, inputs, Y / r, X / r) map a level to (B, channels[0], Y / r0, X / r0)."""
        h = self.blocks[-1](self.lateral[-1](maps[-1]))
        for level in range(len(maps) - 2, -1, -1):
            h = F.interpolate(self.down[level](h), scale_factor=self.factors[level], mode="nearest")
            h = self.blocks[level](h + self.lateral[level](maps[level]))
        return h  # type: ignore[no-any-return]


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (B, C, Y, X) images until both sides are multiples."""
    height, width = images.shape[-2:]
    below, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images


def pool_to_middle(maps: Sequence[Tensor]) -> Tensor:
    """Mean of each channel of each level under a Gaussian window about the middle, where the cell is.

    The window's standard deviation is a quarter of the side: one (P, width, Y, X) map a level to (P, sum of widths).
    """
    pooled = []
    for h in maps:
        y, x = (torch.linspace(-2, 2, n, device=h.device).square().mul(-0.5).exp() for n in h.shape[-2:])
        window = y[:, None] * x
        pooled.append((h.float() * (window / window.sum())).sum((2, 3)))
    return torch.cat(pooled, 1)


def _conditions(marker_dim: int, channels: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList([Condition(marker_dim, width) if marker_dim else NoCondition() for width in channels])
