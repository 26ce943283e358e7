"""The translator in use: shared and specific maps of every stain, any subset of stains drawn as any other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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
    stacking
        (C,) in [0, 1]: how much of what further stains add to a prediction from chromatin alone is heeded, by target.
        1 until `settle` has fitted it.

    Raises
    ------
    InputError
        For an unknown backbone.
    """

    any_size, settles = True, True

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
        self.stacking: Tensor
        self.register_buffer("stacking", torch.ones(len(panel)))

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
        """Draw each target from the fused shared maps of the measured stains; images of any size.

        Of cells with further stains beside chromatin, what these add to mean and scale is weighted by `stacking`.
        """
        size = size_of(images)
        trunk, fused, encoded = self._fused(images, measured)
        several = measured[:, self.panel.chromatin_index] & (measured.sum(1) > 1)
        rows = several.nonzero()[:, 0]
        alone = self._of_chromatin(encoded, several) if len(rows) else trunk
        asked = [torch.full((len(images),), target, device=images.device) for target in targets]
        means, scales = list[Tensor](), list[Tensor]()
        for channels in asked:
            found = self._draw(trunk, channels, size)
            heeded = torch.where(measured.gather(1, channels[:, None])[:, 0], 1.0, self.stacking[channels])[rows]
            if (heeded < 1).any():
                first, weight = self._draw(alone, channels[rows], size), heeded[:, None, None, None]
                mixed = [torch.lerp(few, whole[rows], weight) for few, whole in zip(first, found, strict=True)]
                found = [whole.index_copy(0, rows, few) for whole, few in zip(found, mixed, strict=True)]
            means.append(found[0])
            scales += found[1:]

        def sharp() -> Tensor:
            texture = self.network.texture_trunk(fused.shared)
            return torch.cat([self.network.sharpen(m, texture, c) for m, c in zip(means, asked, strict=True)], 1)

        return Prediction(torch.cat(means, 1), torch.cat(scales, 1) if scales else None, sharp if self.sharp else None)

    def _draw(self, trunk: Tensor, channels: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Return the mean, and of a head that has one the standard deviation."""
        mean, log_scale = self.network.decode(trunk, channels, size)
        std = 2**0.5 if self.config.head == "laplace" else 1.0  # of a Laplace distribution of scale 1
        return [mean] if log_scale is None else [mean, std * log_scale.exp()]

    def reconstruct(self, images: Tensor, measured: Tensor, *, specific: bool) -> Tensor:
        """Rebuild each measured stain from its own shared maps, and with `specific` its own detail."""
        out = torch.zeros_like(images, dtype=torch.float32)
        cells, channels, maps = self._encoded(images, measured)
        alone = self._alone(maps, channels)
        detail = self.network.own_detail(maps.specific) if specific else None
        mean, _ = self.network.decode(self.network.shared_path(alone.shared), channels, size_of(images), detail)
        out[cells, channels] = mean[:, 0]
        return out

    def settle(self, batches: Iterable[Batch], total: Callable[[Tensor], Tensor]) -> str:
        """Fit `stacking`: where further stains tell nothing of a target, what was learnt from them is noise.

        Of each target's two predictions, from chromatin alone and from all other stains of the cell, the mixture of
        least squared error (stacked regressions, Breiman 1996, here of two that sum to one).
        """
        sums = self.stacking.new_zeros(2, len(self.panel))
        for batch in batches:
            several = batch.measured[:, self.panel.chromatin_index] & (batch.measured.sum(1) > 2)
            if several.any():
                sums += self._further(batch.images[several], batch.measured[several])
        explained, added = total(sums)
        self.stacking.copy_(torch.where(added > 0, explained / added, 1.0).clamp(0, 1))
        markers = self.panel.markers
        each = [f"{markers[c]} {float(self.stacking[c]):.0%}" for c in (added > 0).nonzero()[:, 0].tolist()]
        beside = (
            f"of what further stains add to predictions from {markers[self.panel.chromatin_index]}, as much is heeded"
        )
        return f"{beside}: {', '.join(each)} (fitted on held-out cells)" if each else ""

    def _further(self, images: Tensor, measured: Tensor) -> Tensor:
        """Sums over pixels of what further stains add to each target, (2, C): times what was missed, and squared."""
        size, sums = size_of(images), self.stacking.new_zeros(2, len(self.panel))
        cells, channels, maps = self._encoded(images, measured)
        alone = self._of_chromatin((cells, channels, maps), measured.new_ones(len(images)))
        for target in (c for c in range(len(self.panel)) if c != self.panel.chromatin_index):
            rows, others = measured[:, target].nonzero()[:, 0], channels != target
            if len(rows):
                fused = self.network.fuse(maps.told(others), channels[others], cells[others], len(images))
                asked = channels.new_full((len(rows),), target)
                trunks = (alone, self.network.shared_path(fused.shared))
                first, whole = (self.network.decode(trunk[rows], asked, size)[0] for trunk in trunks)
                added, missed = whole - first, images[rows, target, None] - first
                sums[:, target] = torch.stack([(added * missed).sum(), added.square().sum()])
        return sums

    def _encoded(self, images: Tensor, measured: Tensor) -> tuple[Tensor, Tensor, Maps]:
        cells, channels = measured.nonzero(as_tuple=True)
        return cells, channels, self.network.encode(images[cells, channels, None], channels)

    def _alone(self, maps: Maps, channels: Tensor) -> Maps:
        """What each stain tells by itself: its maps, or as an expert their product with the prior."""
        rows = torch.arange(len(channels), device=channels.device)
        return self.network.fuse(maps, channels, rows, len(rows)) if maps.log_std else maps

    def _of_chromatin(self, encoded: tuple[Tensor, Tensor, Maps], which: Tensor) -> Tensor:
        """What chromatin alone tells of the cells that `which` (B,) marks, all of which show it: their trunk."""
        cells, channels, maps = encoded
        rows = which[cells] & (channels == self.panel.chromatin_index)
        trunk: Tensor = self.network.shared_path(self._alone(maps.told(rows), channels[rows]).shared)
        return trunk

    def _fused(self, images: Tensor, measured: Tensor) -> tuple[Tensor, Maps, tuple[Tensor, Tensor, Maps]]:
        cells, channels, maps = self._encoded(images, measured)
        fused = self.network.fuse(maps, channels, cells, len(images))
        return self.network.shared_path(fused.shared), fused, (cells, channels, maps)


def size_of(images: Tensor) -> tuple[int, int]:
    """Return Y and X."""
    return images.shape[-2], images.shape[-1]
