"""The translator's network: stains to shared and specific maps, shared maps fused, and back to stains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgshared.models.fusion import fuse_mean, fuse_product
from imgshared.models.pyramid import Condition, ConvPyramid, TimmPyramid, UpPath, pad_to_multiple
from imgshared.types import InputError

LOG_SCALE = (-6.0, 3.0)  # of a predicted pixel's scale, in normalised units
LOG_STD = (-5.0, 2.0)  # of a shared map's expert


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


class TranslationNetwork(nn.Module):
    """Encoders, fusion and decoder of any number of markers.

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
        An encoder a marker, else one for chromatin and one for all proteins, conditioned on the marker.
    product
        Whether shared maps are Gaussian experts, fused by their product; else the mean is taken.
    outputs
        1: mean; 2: mean and log scale.
    marker_dim
        Length of a marker's embedding.
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
    ) -> None:
        super().__init__()
        if min(channels) < 2:
            raise InputError(f"method.channels = {list(channels)}: a level needs two, one shared and one specific")
        self.widths = [min(max(round(shared_fraction * c), 1), c - 1) for c in channels]
        self.markers, self.product, self.outputs = markers, product, outputs
        network_of = [c if by_marker else int(c != chromatin) for c in range(markers)]
        self.register_buffer("network_of", torch.tensor(network_of), persistent=False)
        build = ConvPyramid if backbone == "conv" else lambda widths: TimmPyramid(backbone, widths)
        self.encoders = nn.ModuleList([build(channels) for _ in range(max(network_of) + 1)])
        self.reductions: tuple[int, ...] = self.encoders[0].reductions  # type: ignore[assignment]
        self.marker = nn.Embedding(markers, marker_dim)
        self.conditions = nn.ModuleList([Condition(marker_dim, c) for c in channels])
        self.log_std = nn.ModuleList([_zero(nn.Conv2d(s, s, 1)) for s in self.widths] if product else [])
        own = [c - s for c, s in zip(channels, self.widths, strict=True)]
        self.shared_path = UpPath(self.widths, channels, self.reductions)
        self.specific_path = UpPath(own, own, self.reductions)
        self.own = nn.Conv2d(own[0], channels[0], 1)
        self.absent = nn.Embedding(markers, channels[0])
        self.head = Head(channels[0], markers, marker_dim, self.reductions[0], outputs)

    @property
    def multiple(self) -> int:
        """What both sides of an image are padded to a multiple of."""
        return self.reductions[-1]

    def encode(self, images: Tensor, channels: Tensor) -> Maps:
        """(P, 1, Y, X) images of any size, of (P,) markers, to their maps."""
        images = pad_to_multiple(images, self.multiple)
        network = self.network_of[channels]  # type: ignore[index]
        order = network.argsort(stable=True)
        counts = torch.bincount(network, minlength=len(self.encoders)).tolist()
        runs = images[order].split(counts)
        each = [encoder(run) for encoder, run in zip(self.encoders, runs, strict=True) if len(run)]
        back, code = order.argsort(), self.marker(channels)
        levels = [torch.cat(level)[back] if len(level) > 1 else level[0] for level in zip(*each, strict=True)]
        levels = [condition(h, code) for condition, h in zip(self.conditions, levels, strict=True)]
        shared = [h[:, :s] for h, s in zip(levels, self.widths, strict=True)]
        specific = [h[:, s:] for h, s in zip(levels, self.widths, strict=True)]
        log_std = [f(h).clamp(*LOG_STD) for f, h in zip(self.log_std, shared, strict=False)]
        return Maps(shared, specific, log_std)

    def fuse(self, maps: Maps, cells: Tensor, n: int) -> Maps:
        """Shared maps of P stains to those of the n cells that `cells` (P,) names as their owners."""
        if not self.product:
            return Maps([fuse_mean(h, cells, n) for h in maps.shared])
        fused = [fuse_product(h, s, cells, n) for h, s in zip(maps.shared, maps.log_std, strict=True)]
        return Maps([mean for mean, _ in fused], log_std=[log_std for _, log_std in fused])

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
        h = trunk + (self.absent(channels)[:, :, None, None].to(trunk.dtype) if detail is None else detail)
        out = self.head(h, self.marker(channels), channels).float()[..., : size[0], : size[1]]
        return out[:, :1], out[:, 1:].clamp(*LOG_SCALE) if self.outputs == 2 else None


class Head(nn.Module):
    """Maps at 1 / `reduction` of the resolution to an image.

    A 3x3 convolution under the marker's condition; a 1x1 one of the marker's own, to full resolution; and a last 3x3
    one that all share, which smooths what the pixels of one coarse place would otherwise do each on its own.
    """

    FINE = 4  # channels at full resolution

    def __init__(self, width: int, markers: int, marker_dim: int, reduction: int, outputs: int) -> None:
        super().__init__()
        self.condition = Condition(marker_dim, width)
        self.conv = nn.Conv2d(width, width, 3, 1, 1)
        # The pixels of one place start alike, as after an upsampling (Aitken et al. 2017).
        start = torch.randn(markers, self.FINE, 1, width) * (2 / width) ** 0.5
        places = (markers, self.FINE, reduction**2, width)
        self.weight = nn.Parameter(start.expand(places).reshape(markers, -1, width).clone())
        self.bias = nn.Parameter(torch.zeros(markers, self.FINE * reduction**2))
        self.last = nn.Conv2d(self.FINE, outputs, 3, 1, 1)
        self.reduction = reduction

    def forward(self, x: Tensor, code: Tensor, channels: Tensor) -> Tensor:
        """(Q, width, Y / r, X / r) maps, (Q, marker_dim) embeddings and (Q,) markers to (Q, outputs, Y, X)."""
        h = F.leaky_relu(self.conv(F.leaky_relu(self.condition(x, code), 0.2)), 0.2)
        weight = self.weight[channels].to(h.dtype)
        out = torch.einsum("qwyx,qkw->qkyx", h, weight) + self.bias[channels][:, :, None, None].to(h.dtype)
        return self.last(F.leaky_relu(F.pixel_shuffle(out, self.reduction), 0.2))  # type: ignore[no-any-return]


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
