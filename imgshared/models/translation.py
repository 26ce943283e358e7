"""The translator's network: stains to shared and specific maps, shared maps fused, and back to stains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgshared.models.bounds import LOG_SCALE, soft_bound
from imgshared.models.fusion import fuse_mean, fuse_product, product_of
from imgshared.models.pyramid import (
    Block,
    Condition,
    ConvPyramid,
    TimmPyramid,
    UpPath,
    pad_to_multiple,
    pool_to_middle,
)
from imgshared.types import InputError

LOG_STD = (-5.0, 2.0)  # of a shared map's expert
LOG_TRUST = (-6.0, 6.0)  # of what a stain counts in a mean
CHROMATIN_COUNTS = 10.0  # times as much as any other stain in a fresh network's means, about
WIDEST = 17  # pixels, of texture
TRUST_PACE = 10.0  # times as fast as other parameters, with Adam, are what stains count learnt


@dataclass(frozen=True)
class Maps:
    """One (P, width, Y / r, X / r) map a level, of P stains or cells.

    Parameters
    ----------
    shared, specific
        The two parts of every level; `specific` is empty for the fused maps of cells.
    log_std
        Of the shared maps where they are Gaussian experts, else empty.
    """

    shared: Sequence[Tensor]
    specific: Sequence[Tensor] = ()
    log_std: Sequence[Tensor] = ()

    def told(self, rows: Tensor) -> Maps:
        """What some stains tell of others: their shared part."""
        return Maps([h[rows] for h in self.shared], log_std=[h[rows] for h in self.log_std])


class TranslationNetwork(nn.Module):
    """Encoders, fusion and decoder of any number of markers.

    All stains start alike, encoders and heads: what is bright in one is read and drawn as bright in the others. Where
    none were stained together only a discriminator can tell a stain from its negative, and from starts of each stain's
    own it often does not.

    Parameters
    ----------
    markers, chromatin
        Number of channels of the panel, and which is chromatin.
    channels
        Width of each level.
    shared_fraction
        The part of every level that is shared, at least one channel and at most all but one.
    backbone
        "conv" or a timm model.
    by_marker
        An encoder a marker, else one for chromatin and one for all proteins. Where there are several proteins theirs is
        conditioned on the marker: "conv" at every level from the first on, a timm model at its outputs.
    product
        Whether shared maps are Gaussian experts, fused by their product; else a weighted mean is taken. What a marker
        counts in a channel is learnt: lamina lies where chromatin ends, whatever a further stain shows of membranes.
    outputs
        1: mean; 2: mean and log scale.
    marker_dim
        Length of a marker's embedding.
    sharp
        Whether there is a second head, which adds texture to the mean.
    """

    def __init__(
        self,
        *,
        markers: int,
        chromatin: int,
        channels: Sequence[int],
        shared_fraction: float,
        backbone: str,
        by_marker: bool,
        product: bool,
        outputs: int,
        marker_dim: int,
        sharp: bool,
    ) -> None:
        super().__init__()
        if min(channels) < 2:
            raise InputError(f"method.channels = {list(channels)}: a level needs two, one shared and one specific")
        self.widths = [min(max(round(shared_fraction * c), 1), c - 1) for c in channels]
        self.markers, self.outputs = markers, outputs
        network_of = [c if by_marker else int(c != chromatin) for c in range(markers)]
        self.register_buffer("network_of", torch.tensor(network_of), persistent=False)
        build = ConvPyramid if backbone == "conv" else partial(TimmPyramid, backbone)
        self._places = network_of
        serves = [network_of.count(i) for i in range(max(network_of) + 1)]
        self.encoders = nn.ModuleList([build(channels, marker_dim=marker_dim if n > 1 else 0) for n in serves])
        for encoder in self.encoders[1:]:  # all alike: a condition, which not all have, starts as the identity
            encoder.load_state_dict(self.encoders[0].state_dict(), strict=False)
        self.reductions: tuple[int, ...] = self.encoders[0].reductions  # type: ignore[assignment]
        self.marker = nn.Embedding(markers, marker_dim)
        self.log_std = nn.ModuleList([_zero(nn.Conv2d(s, s, 1)) for s in self.widths] if product else [])
        self.trust = None if product else nn.Parameter(torch.zeros(markers, sum(self.widths)))
        if self.trust is not None:  # chromatin is nearly always there: the others earn their say
            self.trust.data[chromatin] = math.log(CHROMATIN_COUNTS) / TRUST_PACE
        own = [c - s for c, s in zip(channels, self.widths, strict=True)]
        self.shared_path = UpPath(self.widths, channels, self.reductions)
        self.specific_path = UpPath(own, own, self.reductions)
        self.own = nn.Conv2d(own[0], channels[0], 1)
        self.absent = nn.Embedding(markers, channels[0])
        self.head = Head(channels[0], markers, marker_dim, self.reductions[0], outputs)
        self.texture = Texture(self.widths, channels, self.reductions, markers, marker_dim) if sharp else None

    @property
    def multiple(self) -> int:
        """What both sides of an image are padded to a multiple of."""
        return self.reductions[-1]

    def encode(self, images: Tensor, channels: Tensor) -> Maps:
        """(P, 1, Y, X) images of any size, of (P,) markers, to their maps."""
        if not len(images):  # no cell shows any stain
            one = self.encode(images.new_zeros(1, *images.shape[1:]), channels.new_zeros(1))
            return Maps(*([h[:0] for h in part] for part in (one.shared, one.specific, one.log_std)))
        images = pad_to_multiple(images, self.multiple)
        network = self.network_of[channels]  # type: ignore[index]
        order = network.argsort(stable=True)
        counts = torch.bincount(network, minlength=len(self.encoders)).tolist()
        runs = zip(self.encoders, images[order].split(counts), self.marker(channels[order]).split(counts), strict=True)
        each = [encoder(run, code) for encoder, run, code in runs if len(run)]
        back = order.argsort()
        return self._split(
            [torch.cat(level)[back] if len(level) > 1 else level[0] for level in zip(*each, strict=True)]
        )

    def encode_as(self, images: Tensor, channel: int) -> Maps:
        """`encode` (P, 1, Y, X) images that are all of one marker: a graph without choices, which can be exported."""
        code = self.marker.weight[channel].expand(images.shape[0], -1)  # len() would fix the size of an exported graph
        return self._split(self.encoders[self._places[channel]](pad_to_multiple(images, self.multiple), code))

    def _split(self, levels: Sequence[Tensor]) -> Maps:
        shared = [h[:, :s] for h, s in zip(levels, self.widths, strict=True)]
        specific = [h[:, s:] for h, s in zip(levels, self.widths, strict=True)]
        # start=0: fresh experts are as wide as the prior
        log_std = [soft_bound(f(h), *LOG_STD, start=0.0) for f, h in zip(self.log_std, shared, strict=False)]
        return Maps(shared, specific, log_std)

    def pool(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """One (P, width, Y / r, X / r) map a level, of images of the given `size`, to latents (P, sum of widths)."""
        return pool_to_middle(maps, self.reductions, size)

    def fuse(self, maps: Maps, channels: Tensor, cells: Tensor, n: int) -> Maps:
        """Shared maps of P stains, of (P,) markers, to those of the n cells that `cells` (P,) names as their owners."""
        if self.trust is not None:
            weights = soft_bound(TRUST_PACE * self.trust[channels], *LOG_TRUST).exp().split(self.widths, 1)
            return Maps([fuse_mean(h, w, cells, n) for h, w in zip(maps.shared, weights, strict=True)])
        fused = [fuse_product(h, s, cells, n) for h, s in zip(maps.shared, maps.log_std, strict=True)]
        return Maps([mean for mean, _ in fused], log_std=[log_std for _, log_std in fused])

    def fuse_stains(self, stains: Sequence[Maps], channels: Sequence[int]) -> Maps:
        """`fuse` the maps of several stains of the same cells in the same order: a graph without choices."""
        if self.trust is None:
            levels = zip(zip(*(m.shared for m in stains), strict=True), zip(*(m.log_std for m in stains), strict=True),
                         strict=True)  # fmt: skip
            fused = [product_of(torch.stack(h), torch.stack(s)) for h, s in levels]
            return Maps([mean for mean, _ in fused], log_std=[log_std for _, log_std in fused])
        if len(stains) == 1:
            return Maps(stains[0].shared)
        weights = soft_bound(TRUST_PACE * self.trust[list(channels)], *LOG_TRUST).exp()
        shares = (weights / weights.sum(0)).split(self.widths, 1)
        each = zip(*(m.shared for m in stains), strict=True)
        return Maps(
            [
                (w[:, None, :, None, None] * torch.stack(h).float()).sum(0).to(h[0].dtype)
                for w, h in zip(shares, each, strict=True)
            ]
        )

    def own_detail(self, specific: Sequence[Tensor]) -> Tensor:
        """What the specific maps of Q stains add to the shared ones: (Q, width, Y / r0, X / r0)."""
        return self.own(self.specific_path(specific))  # type: ignore[no-any-return]

    def decode(
        self, trunk: Tensor, channels: Tensor, size: tuple[int, int], detail: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw the stains `channels` (Q,) from (Q, width, Y / r0, X / r0) shared maps.

        With `detail` from the stain's own specific maps; without it the learnt code of an absent stain stands there.

        Returns
        -------
        Mean and log scale (None without that head), (Q, 1, Y, X) of the given `size`, Y and X: without the padding.
        """
        absent = self.absent(channels)[:, :, None, None].to(trunk.dtype)
        h = trunk + (absent if detail is None else detail)
        out = self.head(h, self.marker(channels), channels)[..., : size[0], : size[1]]
        return out[:, :1], soft_bound(out[:, 1:], *LOG_SCALE) if self.outputs == 2 else None

    def texture_trunk(self, shared: Sequence[Tensor]) -> Tensor:
        """Shared maps of cells to the (B, width, Y / r0, X / r0) trunk of their texture, the same for every stain."""
        assert self.texture is not None
        return self.texture.path([h.detach() for h in shared])  # type: ignore[no-any-return]

    def sharpen(self, mean: Tensor, trunk: Tensor, channels: Tensor) -> Tensor:
        """Add texture, from its own (Q, width, Y / r0, X / r0) trunk, to the (Q, 1, Y, X) mean of absent stains.

        An image cannot be both the expectation of a stain and look like one (Blau & Michaeli 2018): so there are two,
        and no gradient of the second one goes further back than `texture`. Texture is what is fine: how bright a cell
        is, the mean tells best, and a discriminator that had a say in it would only add noise.
        """
        assert self.texture is not None
        out = less_wide(self.texture(trunk, self.marker(channels).detach(), channels))  # as of an image that was padded
        return mean.detach() + out[..., : mean.shape[-2], : mean.shape[-1]]


class Head(nn.Module):
    """Maps at 1 / `reduction` of the resolution to an image.

    The marker's condition; a 1x1 convolution of the marker's own, to full resolution; and a last 3x3 one that all
    share, which smooths what the pixels of one coarse place would otherwise do each on its own. Light, for it is what
    every further stain of a cell costs.
    """

    FINE = 4  # channels at full resolution

    def __init__(self, width: int, markers: int, marker_dim: int, reduction: int, outputs: int) -> None:
        super().__init__()
        self.condition = Condition(marker_dim, width)
        # The pixels of one place start alike, as after an upsampling (Aitken et al. 2017), and so do all markers.
        start = torch.randn(self.FINE, 1, width) * (2 / width) ** 0.5
        places = (markers, self.FINE, reduction**2, width)
        self.weight = nn.Parameter(start.expand(places).reshape(markers, -1, width).clone())
        self.bias = nn.Parameter(torch.zeros(markers, self.FINE * reduction**2))
        self.last = nn.Conv2d(self.FINE, outputs, 3, 1, 1)
        self.reduction = reduction

    def forward(self, x: Tensor, code: Tensor, channels: Tensor) -> Tensor:
        """(Q, width, Y / r, X / r) maps, (Q, marker_dim) embeddings and (Q,) markers to (Q, outputs, Y, X) float32."""
        h = F.leaky_relu(self.condition(x, code), 0.2)
        weight = self.weight[channels].to(h.dtype)
        out = torch.einsum("qwyx,qkw->qkyx", h, weight) + self.bias[channels][:, :, None, None].to(h.dtype)
        fine = F.leaky_relu(F.pixel_shuffle(out, self.reduction), 0.2)
        with torch.autocast(fine.device.type, enabled=False):  # bf16 would round an intensity near 1 to 1/128
            return self.last(fine.float())  # type: ignore[no-any-return]


class Texture(nn.Module):
    """A pyramid of shared maps to the texture of a stain, at first none: a path of its own, a block, a head.

    What is drawn must be decided on somewhere (where does the membrane run that the mean only smears?): at every level,
    not in a head.
    """

    def __init__(
        self, widths: Sequence[int], channels: Sequence[int], reductions: Sequence[int], markers: int, marker_dim: int
    ) -> None:
        super().__init__()
        self.path = UpPath(widths, channels, reductions)
        self.condition = Condition(marker_dim, channels[0])
        self.block = Block(channels[0])
        self.head = Head(channels[0], markers, marker_dim, reductions[0], 1)
        _zero(self.head.last)

    def forward(self, trunk: Tensor, code: Tensor, channels: Tensor) -> Tensor:
        """What `path` made of the shared maps, (Q, width, Y / r, X / r), embeddings and markers to (Q, 1, Y, X)."""
        return self.head(self.block(self.condition(trunk, code)), code, channels)  # type: ignore[no-any-return]


def less_wide(images: Tensor, width: int = WIDEST) -> Tensor:
    """(Q, 1, Y, X) images without what is wider than `width` pixels (odd): less their box blur, taken twice."""
    wide = images
    for box in ((width, 1), (1, width)) * 2:
        wide = F.avg_pool2d(wide, box, 1, (box[0] // 2, box[1] // 2), count_include_pad=False)
    return images - wide


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
