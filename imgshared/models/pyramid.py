"""Encoders from one stain to a pyramid of feature maps: this project's own, or a timm backbone."""

from __future__ import annotations

import contextlib
import copy
import difflib
import itertools
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Leave the running statistics of a network's BatchNorm, by which it predicts, to the real images it is shown."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    paces = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, pace in zip(norms, paces, strict=True):
            norm.momentum = pace


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
        Where timm knows no such model (the nearest is named), it gives no pyramid, one of fewer levels, or does not
        take images of any size.
    """

    def __init__(self, name: str, channels: Sequence[int], *, inputs: int = 1, marker_dim: int = 0) -> None:
        super().__init__()
        self.name, self.inputs = name, inputs
        import timm  # slow to import, and only needed here

        known = timm.list_models()
        architecture, _, weights = name.partition(".")
        if architecture not in known:
            near = difflib.get_close_matches(architecture, known, n=1, cutoff=0.4)
            raise InputError(
                f"method.backbone: timm knows no model {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")
            )
        if weights:
            raise InputError(
                f"method.backbone: {name!r} names pretrained weights, and backbones learn from the start here: name "
                f"{architecture!r}"
            )
        levels = tuple(range(len(channels)))
        try:
            with torch.inference_mode(False):  # whose tensors have no gradients, by which the last lines here go
                self.body = timm.create_model(
                    name, pretrained=False, features_only=True, in_chans=inputs, out_indices=levels
                )
        except (RuntimeError, AttributeError, TypeError) as error:
            raise InputError(f"method.backbone: {name} gives no pyramid of features ({error})") from error
        except (IndexError, AssertionError) as error:  # as timm says it of either kind of model
            raise InputError(f"method.channels has {len(channels)} levels, more than {name}: name fewer") from error
        info: Any = self.body.feature_info
        self.reductions = tuple(info.reduction())
        for height, width in ((4, 4), (3, 5)):
            self._try(height * self.reductions[-1], width * self.reductions[-1])
        with torch.inference_mode(False), torch.enable_grad():
            _drop_unheard(self.body, torch.zeros(1, inputs, *2 * (4 * self.reductions[-1],)))
        self.project = nn.ModuleList([nn.Conv2d(a, b, 1) for a, b in zip(info.channels(), channels, strict=True)])
        self.conditions = _conditions(marker_dim, channels)

    def forward(self, images: Tensor, code: Tensor | None = None) -> list[Tensor]:
        """As `ConvPyramid.forward`."""
        levels = zip(self.body(images), self.project, self.conditions, strict=True)
        return [condition(project(h), code) for h, project, condition in levels]

    @torch.no_grad()
    def _try(self, height: int, width: int) -> None:
        """Refuse a backbone whose maps of such an image are not that image over its reductions."""
        try:
            maps = self.body.eval()(torch.zeros(1, self.inputs, height, width))
        except (AssertionError, RuntimeError, ValueError) as error:  # as timm's transformers say it
            raise InputError(
                f"method.backbone: {self.name} does not take images of {height} x {width} px ({error}): name a "
                "convolutional one, e.g. resnet10t"
            ) from error
        shapes = [tuple(h.shape[2:]) for h in maps]
        if shapes != [(height // r, width // r) for r in self.reductions]:
            raise InputError(
                f"method.backbone: {self.name} makes maps of {shapes} px of an image of {height} x {width} px, not of "
                f"it over {self.reductions}: name another one, e.g. resnet10t"
            )
        self.body.train()

    @torch.no_grad()
    def check_fits(self, crop_px: int) -> None:
        """Refuse crops of which some level keeps a single pixel, where it normalises over one stain's pixels.

        Raises
        ------
        InputError
            Names the setting.
        """
        try:
            copy.deepcopy(self.body).train()(torch.zeros(1, self.inputs, crop_px, crop_px))
        except ValueError as error:  # as torch's BatchNorm says it
            raise InputError(
                f"method.backbone: {self.name} cannot learn from a single {crop_px} px crop ({error}): "
                "name a backbone without normalised global features, e.g. resnet10t, or larger crops"
            ) from error


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


def pool_to_middle(maps: Sequence[Tensor], reductions: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Mean of each channel of each level under a Gaussian window about the middle of the image, where the cell is.

    One (P, width, Y / r, X / r) map a level, of images that were `size` (Y, X) before they were padded below and to the
    right, to (P, sum of widths). The window's standard deviation is a quarter of the image's side.
    """
    pooled = []
    for h, r in zip(maps, reductions, strict=True):
        y, x = (_window(n, r, side, h.device) for n, side in zip(h.shape[-2:], size, strict=True))
        pooled.append((h.float() * y[:, None] * x).sum((2, 3)))
    return torch.cat(pooled, 1)


def _window(n: int, step: int, side: int, device: torch.device) -> Tensor:
    """Weights, of sum 1, of n places `step` pixels apart about the middle of a side of so many pixels."""
    pixels = (torch.arange(n, device=device) + 0.5) * step - side / 2
    return (-0.5 * (pixels / (side / 4)).square()).softmax(0)


def _drop_unheard(body: nn.Module, image: Tensor) -> None:
    """Put nothing in place of the parts of a backbone that no level hears; some of timm's run on behind the last."""
    torch.stack([h.float().sum() for h in body.eval()(image)]).sum().backward()
    unheard = [
        name
        for name, module in body.named_modules()
        if any(True for _ in module.parameters()) and all(p.grad is None for p in module.parameters())
    ]
    for name in unheard:
        if not any(name.startswith(f"{whole}.") for whole in unheard):
            body.set_submodule(name, nn.Identity())
    body.train().zero_grad()


def _conditions(marker_dim: int, channels: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList([Condition(marker_dim, width) if marker_dim else NoCondition() for width in channels])
