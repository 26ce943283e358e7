"""The translator in use: shared and specific maps of every stain, any subset of stains drawn as any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imgshared import losses
from imgshared.config import TranslatorConfig
from imgshared.data.panel import Panel
from imgshared.methods.base import LatentMethod, sum_terms, with_partner
from imgshared.models.translation import Maps, TranslationNetwork
from imgshared.types import Batch, Latents, LossTerms, Prediction


class MapMethod(LatentMethod):
    """What the translator does with its network once that has learnt; how it learns is in `translator`.

    Parameters
    ----------
    config
        Sizes, head and error.
    panel
        The markers.

    Attributes
    ----------
    paired
        Whether some training cell shows chromatin and another stain.

    Raises
    ------
    InputError
        For an unknown backbone.
    """

    any_size = True

    def __init__(self, config: TranslatorConfig, panel: Panel) -> None:
        super().__init__()
        self.config, self.panel, self.paired = config, panel, True
        self.sharp, self.scaled = bool(config.weights.sharp), config.head != "mean"
        self.network = TranslationNetwork(
            markers=len(panel), chromatin=panel.chromatin_index, channels=config.channels,
            shared_fraction=config.shared_fraction, backbone=config.backbone, by_marker=config.encoders == "marker",
            product=config.fusion == "product", outputs=1 if config.head == "mean" else 2, marker_dim=config.marker_dim,
            sharp=self.sharp,
        )  # fmt: skip

    def prepare(self, measured: Tensor, seed: int) -> None:
        """See whether any cell shows chromatin and another stain."""
        super().prepare(measured, seed)
        self.paired = bool(with_partner(measured, self.panel.chromatin_index).any())

    def _error(self, mean: Tensor, log_scale: Tensor | None, target: Tensor) -> Tensor:
        kind = self.config.error if log_scale is None else self.config.head
        return losses.pixel_loss(mean, target, kind, log_scale)  # type: ignore[arg-type]

    def validate(self, batch: Batch) -> LossTerms:
        """Error of the stains predicted from chromatin alone; of every stain rebuilt where no cell has both."""
        terms = self._predicted(batch) if self.paired else self._rebuilt(batch)
        return terms or LossTerms(batch.images.new_zeros(()), {}, count=0)

    def _predicted(self, batch: Batch) -> LossTerms | None:
        chromatin = self.panel.chromatin_index
        asked = batch.measured[:, chromatin, None] & batch.measured
        asked[:, chromatin] = False
        cells, channels = asked.nonzero(as_tuple=True)
        if not len(cells):
            return None
        given = torch.zeros_like(batch.measured)
        given[:, chromatin] = batch.measured[:, chromatin]
        trunk, _, _ = self._fused(batch.images, given)
        mean, log_scale = self.network.decode(trunk[cells], channels, size_of(batch.images))
        error = self._error(mean, log_scale, batch.images[cells, channels, None])
        return sum_terms({"cross": error}, count=len(cells))

    def _rebuilt(self, batch: Batch) -> LossTerms | None:
        if not batch.measured.any():
            return None
        rebuilt = self.reconstruct(batch.images, batch.measured, specific=True)[batch.measured]
        error = losses.pixel_loss(rebuilt, batch.images[batch.measured], self.config.error)
        return sum_terms({"full": error}, count=len(rebuilt))

    def encode(self, images: Tensor, measured: Tensor) -> Latents:
        """Pool the maps about the middle of the crop: the levels' channels, one after the other."""
        _, fused, (cells, channels, maps) = self._fused(images, measured)
        b, c = measured.shape
        size = size_of(images)
        shared = self.network.pool(self._alone(maps, channels).shared, size)
        specific = self.network.pool(maps.specific, size)
        each = shared.new_zeros(b, c, shared.shape[1])
        own = specific.new_zeros(b, c, specific.shape[1])
        each[cells, channels], own[cells, channels] = shared, specific
        return Latents(self.network.pool(fused.shared, size), each, own, measured)

    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        """Draw each target from the fused shared maps of the measured stains; images of any size."""
        trunk, fused, _ = self._fused(images, measured)
        asked = [torch.full((len(images),), target, device=images.device) for target in targets]
        means, scales = list[Tensor](), list[Tensor]()
        for channels in asked:
            mean, log_scale = self.network.decode(trunk, channels, size_of(images))
            means.append(mean)
            if log_scale is not None:
                std = 2**0.5 if self.config.head == "laplace" else 1.0  # of a Laplace distribution of scale 1
                scales.append(std * log_scale.exp())

        def sharp() -> Tensor:
            texture = self.network.texture_trunk(fused.shared)
            return torch.cat([self.network.sharpen(m, texture, c) for m, c in zip(means, asked, strict=True)], 1)

        return Prediction(torch.cat(means, 1), torch.cat(scales, 1) if scales else None, sharp if self.sharp else None)

    def reconstruct(self, images: Tensor, measured: Tensor, *, specific: bool) -> Tensor:
        """Rebuild each measured stain from its own shared maps, and with `specific` its own detail."""
        out = torch.zeros_like(images, dtype=torch.float32)
        cells, channels, maps = self._encoded(images, measured)
        alone = self._alone(maps, channels)
        detail = self.network.own_detail(maps.specific) if specific else None
        mean, _ = self.network.decode(self.network.shared_path(alone.shared), channels, size_of(images), detail)
        out[cells, channels] = mean[:, 0]
        return out

    def _encoded(self, images: Tensor, measured: Tensor) -> tuple[Tensor, Tensor, Maps]:
        cells, channels = measured.nonzero(as_tuple=True)
        return cells, channels, self.network.encode(images[cells, channels, None], channels)

    def _alone(self, maps: Maps, channels: Tensor) -> Maps:
        """What each stain tells by itself: its maps, or as an expert their product with the prior."""
        rows = torch.arange(len(channels), device=channels.device)
        return self.network.fuse(maps, channels, rows, len(rows)) if maps.log_std else maps

    def _fused(self, images: Tensor, measured: Tensor) -> tuple[Tensor, Maps, tuple[Tensor, Tensor, Maps]]:
        cells, channels, maps = self._encoded(images, measured)
        fused = self.network.fuse(maps, channels, cells, len(images))
        return self.network.shared_path(fused.shared), fused, (cells, channels, maps)


def size_of(images: Tensor) -> tuple[int, int]:
    """Return Y and X."""
    return images.shape[-2], images.shape[-1]
