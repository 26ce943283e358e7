"""pix2pix: conditional adversarial translation of cells stained together (Isola, Zhu, Zhou & Efros 2017)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imgshared.config import Pix2pixConfig
from imgshared.data.panel import Panel
from imgshared.losses import adversarial_generator, pixel_loss
from imgshared.methods.base import ParameterGroup, Stage, no_terms, sum_terms
from imgshared.methods.game import BETAS, discriminator_terms, signs_of_defeat
from imgshared.methods.paired import PairedMethod
from imgshared.models.discriminator import PatchDiscriminator
from imgshared.models.discriminator import check_fits as check_discriminator_fits
from imgshared.models.unet import StridedUNet, check_fits
from imgshared.types import Batch, LossTerms, Prediction


@dataclass(frozen=True)
class Shown:
    """The P pairs of a batch, as the discriminator judges them.

    Parameters
    ----------
    batch
        Whose pairs they are.
    sources
        (P, S, Y, X) the source stains of each pair's cell.
    markers
        (P,) int64, the channel of each pair's target.
    real, fake
        (P, 1, Y, X) measured and predicted target.
    """

    batch: Batch
    sources: Tensor
    markers: Tensor
    real: Tensor
    fake: Tensor


class Pix2pix(PairedMethod):
    """A U-Net translates the sources; a patch discriminator judges pairs of sources and one stain.

    Minimises over G, maximises over D: E log D(x, y) + E log(1 - D(x, G(x))), and over G lambda E |y - G(x)| (eq. 4).
    With several targets G predicts all of them and D, conditioned on the marker, judges one at a time. The
    discriminator has BatchNorm as in the paper, and no norm with an R1 penalty: that is the slope at single images,
    which BatchNorm mixes.

    Unlike the paper: in prediction dropout, its noise, is off, and BatchNorm goes by running averages, where the paper
    keeps the noise and takes the statistics of the test batch, so that a cell is predicted the same in any company.
    Both players move at once, by gradients of the same step: G is judged by the D from before its update, where the
    published code updates D first.

    Parameters
    ----------
    config
        Sources, sizes, weights and optimisation.
    panel
        The model's.
    crop_px
        Side of the training crops; translation takes images of any size.

    Raises
    ------
    InputError
        Where a network does not fit the crops; for unknown sources.
    """

    config: Pix2pixConfig

    def __init__(self, config: Pix2pixConfig, *, panel: Panel, crop_px: int) -> None:
        super().__init__(config, panel)
        check_fits(crop_px, 2 ** len(config.channels), config.channels)
        check_discriminator_fits(crop_px, config.discriminator_channels)
        self.generator = StridedUNet(len(self.sources), len(self.targets), config.channels, dropout=config.dropout)
        self.discriminator = PatchDiscriminator(
            len(self.sources) + 1,
            config.discriminator_channels,
            markers=len(panel) if len(self.targets) > 1 else 0,
            norm="none" if config.r1_weight else "batch",
        )
        self._shown: Shown | None = None

    @property
    def stages(self) -> Sequence[Stage]:
        """One, whose best checkpoint is its end: the held-out L1 prefers blur to what the discriminator teaches.

        The generator moves first. The published code begins with the discriminator; but then the translations would be
        made while the generator is frozen, and a second time in its turn. Both see the same translations either way.
        """
        c = self.config
        groups = {
            "generator": [ParameterGroup(list(self.generator.parameters()), c.lr, BETAS)],
            "discriminator": [ParameterGroup(list(self.discriminator.parameters()), c.lr_discriminator, BETAS)],
        }
        return [Stage("pix2pix", c.epochs, groups, monitored=False, lr_decay=c.lr_decay)]

    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Return the generator's adversarial and L1 terms, or the discriminator's adversarial and R1 terms.

        The discriminator's `accuracy`, the share of patches that it tells right, is no term of its loss.
        """
        shown = self._show(batch, player)
        if shown is None:
            return no_terms(self.parameters())
        return self._generator_loss(shown) if player == "generator" else self._discriminator_loss(shown)

    def _show(self, batch: Batch, player: str) -> Shown | None:
        """Translate a batch; in the discriminator's turn take what the generator made of it in its own."""
        kept, self._shown = self._shown, None
        if player == "discriminator" and kept is not None and kept.batch is batch:
            return kept
        pairs = self.pairs(batch)
        if not len(pairs.shown):
            return None
        cell, target = pairs.shown.nonzero(as_tuple=True)
        markers = torch.tensor(self.targets, device=target.device)[target]
        fake = self.generator(pairs.sources).float()[cell, target, None]
        shown = Shown(batch, pairs.sources[cell], markers, pairs.targets[cell, target, None], fake)
        self._shown = Shown(batch, shown.sources, markers, shown.real, fake.detach()) if player == "generator" else None
        return shown

    def _generator_loss(self, shown: Shown) -> LossTerms:
        c = self.config
        return sum_terms(
            {
                "l1": c.l1_weight * pixel_loss(shown.fake, shown.real, "l1"),
                "adversarial": adversarial_generator(self._judge(shown, shown.fake), c.adversarial),
            }
        )

    def _discriminator_loss(self, shown: Shown) -> LossTerms:
        c = self.config
        images = shown.real.detach().requires_grad_(c.r1_weight > 0)  # of the stain: a source is never predicted
        real, fake = self._judge(shown, images), self._judge(shown, shown.fake.detach())
        return discriminator_terms(real, fake, c.adversarial, r1=c.r1_weight, images=images)

    def _judge(self, shown: Shown, stain: Tensor) -> Tensor:
        logits: Tensor = self.discriminator(torch.cat([shown.sources, stain], 1), shown.markers)
        return logits

    def validate(self, batch: Batch) -> LossTerms:
        """Held-out L1, without its weight, over the measured targets of cells that show all sources."""
        pairs = self.pairs(batch)
        if not len(pairs.shown):
            return no_terms(self.parameters())
        predicted = self.generator(pairs.sources)[pairs.shown]
        return sum_terms({"l1": pixel_loss(predicted, pairs.targets[pairs.shown], "l1")}, count=len(predicted))

    def predict(self, sources: Tensor) -> Prediction:
        """Predict by the generator."""
        return Prediction(self.generator(sources).float())

    def signs(self, values: Mapping[str, float]) -> list[str]:
        """Say where the discriminator wins every time, or runs away."""
        return signs_of_defeat(values, self.config.adversarial, "method.r1_weight")
