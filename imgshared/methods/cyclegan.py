"""CycleGAN: a stain translated there and back is itself (Zhu, Park, Isola & Efros, ICCV 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imgshared.config import CycleGanConfig
from imgshared.data.panel import Panel
from imgshared.losses import adversarial_generator, pixel_loss
from imgshared.methods.base import sum_terms
from imgshared.methods.unpaired import UnpairedMethod, Views, made_discriminator
from imgshared.models.buffer import ImageBuffer
from imgshared.models.discriminator import PatchDiscriminator
from imgshared.models.resnet import ResnetGenerator
from imgshared.types import Batch, LossTerms


class Way(NamedTuple):
    """One direction of translation: P images, the networks that take them there and back, the judge of what arrives.

    Parameters
    ----------
    origin
        "source" or "target": what the images are.
    images, markers
        (P, 1, Y, X), and the (P,) int64 target channels, which condition both generators whichever way they go.
    """

    origin: str
    images: Tensor
    markers: Tensor
    there: ResnetGenerator
    back: ResnetGenerator
    discriminator: PatchDiscriminator


class CycleGan(UnpairedMethod):
    """CycleGAN, with the marker as a condition where there are several.

    G translates the source x to a marker, F a stain y of a marker to the source. They lower, as in the published code,
    ``adversarial(G(x)) + adversarial(F(y)) + cycle_weight * (|F(G(x)) - x| + |G(F(y)) - y|)
    + cycle_weight * identity_weight * (|G(y) - y| + |F(x) - x|)``, mean absolute errors (eq. 1-3 and section 5.2).
    The discriminators see a pool of earlier translations (section 4), of which each process keeps its own.

    Parameters
    ----------
    config
        Sizes and weights.
    panel
        The model's.
    crop_px
        Side of the crops.

    Raises
    ------
    InputError
        As `UnpairedMethod`.
    """

    config: CycleGanConfig

    def __init__(self, config: CycleGanConfig, *, panel: Panel, crop_px: int) -> None:
        super().__init__(config, panel, crop_px)
        self.back = ResnetGenerator(config.width, config.blocks, markers=self.conditions)
        self.source_discriminator = made_discriminator(config, 0)
        shape = (1, crop_px, crop_px)
        self.pool, self.source_pool = ImageBuffer(config.buffer, shape), ImageBuffer(config.buffer, shape)

    def players(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Both generators move together, and so do both discriminators."""
        return [self.generator, self.back], [self.discriminator, self.source_discriminator]

    def generator_loss(self, views: Views) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        """Cycle, identity and adversarial terms, each summed over the ways that have images."""
        c = self.config
        terms: dict[str, list[Tensor]] = {"cycle": [], "identity": [], "adversarial": []}
        fakes = []
        for way in self._ways(views):
            fake = way.there(way.images, way.markers)
            fakes.append(fake)
            terms["adversarial"].append(adversarial_generator(way.discriminator(fake, way.markers), c.adversarial))
            if c.cycle_weight:
                cycle = pixel_loss(way.back(fake, way.markers), way.images, "l1")
                terms["cycle"].append(c.cycle_weight * cycle)
            if weight := c.cycle_weight * c.identity_weight:
                identity = pixel_loss(way.back(way.images, way.markers), way.images, "l1")
                terms["identity"].append(weight * identity)
        return {name: torch.stack(values).sum() for name, values in terms.items() if values}, fakes

    def fake(self, views: Views) -> Sequence[Tensor]:
        """Translate the sources to their targets, and the targets to the source."""
        return [way.there(way.images, way.markers) for way in self._ways(views)]

    def discriminator_loss(self, views: Views, fakes: Sequence[Tensor]) -> LossTerms:
        """Real stains against earlier and new translations, of the targets and of the source; two accuracies."""
        stains, towards = self.pool.exchange(fakes[0], views.towards)
        sources, markers = self.source_pool.exchange(fakes[1], views.markers)
        target = self.judge(self.discriminator, views.reals, views.markers, stains, towards)
        source = self.judge(self.source_discriminator, views.sources, views.towards, sources, markers)
        parts = {name: target.parts[name] + source.parts[name] for name in target.parts if name != "accuracy"}
        each = {f"{of}/accuracy": terms.parts["accuracy"] for of, terms in (("target", target), ("source", source))}
        return LossTerms(target.total + source.total, parts | each)

    def validate(self, batch: Batch) -> LossTerms:
        """Mean absolute error of held-out stains after the way there and back, which tells nothing of what is there."""
        parts = {}
        ways = self._ways(self.draw_same(batch))
        if not ways:
            return LossTerms(batch.images.new_zeros(()), {}, count=0)
        for way in ways:
            returned = way.back(way.there(way.images, way.markers), way.markers)
            parts[f"{way.origin}/cycle"] = pixel_loss(returned, way.images, "l1")
        return sum_terms(parts, count=sum(len(way.images) for way in ways))

    def _ways(self, views: Views) -> list[Way]:
        """Return both ways, or the one that has images."""
        to_target = (self.generator, self.back, self.discriminator)
        to_source = (self.back, self.generator, self.source_discriminator)
        ways = [
            Way("source", views.sources, views.towards, *to_target),
            Way("target", views.reals, views.markers, *to_source),
        ]
        return [way for way in ways if len(way.images)]
