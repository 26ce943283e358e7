"""What CUT and CycleGAN have in common: one source stain, cells that need not show both sides, a discriminator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from imgshared.config import CutConfig, CycleGanConfig
from imgshared.data.panel import Panel
from imgshared.methods.base import Method, ParameterGroup, Stage, no_terms, sum_terms
from imgshared.methods.game import BETAS, discriminator_terms, signs_of_defeat, signs_of_rest
from imgshared.models.discriminator import PatchDiscriminator, check_fits
from imgshared.models.resnet import ResnetGenerator
from imgshared.types import Batch, InputError, LossTerms, Prediction


class Views(NamedTuple):
    """What a step shows of a batch: P source stains and Q real target stains, of the same markers where there are both.

    Parameters
    ----------
    sources, towards
        (P, 1, Y, X) images of all cells that show the source, and the (P,) int64 channels to translate them to.
    reals, markers
        (Q, 1, Y, X) images of target stains, from any cells, and their (Q,) int64 channels.
    """

    sources: Tensor
    towards: Tensor
    reals: Tensor
    markers: Tensor


class UnpairedMethod(Method):
    """One source stain to every other marker, learnt by a game from cells that show either.

    Parameters
    ----------
    config
        Names the source: a marker or an alias; None for chromatin.
    panel
        The model's.
    crop_px
        Side of the crops.

    Attributes
    ----------
    sources, targets
        Channels; together all of the panel.

    Raises
    ------
    InputError
        For an unknown source, no other marker, crops too small for the discriminator.
    """

    sources: tuple[int]
    targets: tuple[int, ...]
    config: CutConfig | CycleGanConfig

    any_size = True
    global_statistics = True

    def __init__(self, config: CutConfig | CycleGanConfig, panel: Panel, crop_px: int) -> None:
        super().__init__()
        check_fits(crop_px, config.discriminator_channels)
        self.config, self.panel = config, panel
        self.sources = (panel.chromatin_index if config.source is None else panel.index(config.source),)
        self.targets = tuple(c for c in range(len(panel)) if c not in self.sources)
        if not self.targets:
            raise InputError(
                f"method.source: {panel.chromatin} is the only marker of the panel, nothing is left to predict"
            )
        self.conditions = len(panel) if len(self.targets) > 1 else 0  # markers that the networks tell apart
        self.generator = ResnetGenerator(config.width, config.blocks, markers=self.conditions)
        self.discriminator = made_discriminator(config, self.conditions)
        self._kept: tuple[Batch, Views, Sequence[Tensor]] | None = None

    @property
    def stages(self) -> Sequence[Stage]:
        """The game; no held-out pair tells better from worse, so the end of the training is what counts."""
        c = self.config
        generators, discriminators = self.players()
        groups = {
            "generator": [ParameterGroup(_parameters(generators), c.lr, BETAS)],
            "discriminator": [ParameterGroup(_parameters(discriminators), c.lr_discriminator, BETAS)],
        }
        return [Stage("unpaired", c.epochs, groups, monitored=False, lr_decay=c.lr_decay)]

    @abstractmethod
    def players(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the networks of the generator and those of the discriminator."""

    @abstractmethod
    def generator_loss(self, views: Views) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        """Return the generator's terms and the images it made; a side of `views` may be empty, not both."""

    @abstractmethod
    def fake(self, views: Views) -> Sequence[Tensor]:
        """Return the images that `generator_loss` makes."""

    @abstractmethod
    def discriminator_loss(self, views: Views, fakes: Sequence[Tensor]) -> LossTerms:
        """Return the discriminator's terms and its accuracy; no side of `views` is empty."""

    def prepare(self, measured: Tensor, seed: int) -> None:
        """Refuse cells of which none shows the source, or none some target."""
        super().prepare(measured, seed)
        for channel in (*self.sources, *self.targets):
            if not measured[:, channel].any():
                marker, advice = self.panel.markers[channel], "leave it out (markers=...)"
                if channel in self.sources:
                    advice = "choose another method.source"
                elif marker == self.panel.chromatin:
                    advice = (
                        "it is chromatin, which every panel keeps: change the split, so that some training cell does"
                    )
                raise InputError(f"{self.config.name} learns from cells that show {marker}, and none does: {advice}")

    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Return a player's loss; 0 for what a batch without sources, or without targets, cannot tell."""
        if player == "generator":
            views = self.draw(batch)
            if not len(views.sources) and not len(views.reals):
                return self._nothing(player)
            parts, fakes = self.generator_loss(views)
            self._kept = (batch, views, [fake.detach() for fake in fakes])
            return sum_terms(parts) if parts else self._nothing(player)
        views, fakes = self._recall(batch)
        if not len(views.sources) or not len(views.reals):
            return self._nothing(player)
        return self.discriminator_loss(views, fakes)

    def draw(self, batch: Batch) -> Views:
        """Draw a target marker for every cell with the source, and as many real stains of the same markers.

        Markers are drawn evenly among those that the batch shows, and the real stains of each evenly among the cells
        that show it, whether or not they show the source. All from torch's global generator on the CPU, on any device.
        """
        measured = batch.measured.cpu()
        cells = measured[:, self.sources[0]].nonzero()[:, 0]
        shown = measured[:, list(self.targets)]
        here = shown.any(0)
        choice = torch.tensor(self.targets)[here if here.any() else slice(None)]
        n = len(cells) or int(shown.any(1).sum())
        drawn = choice[torch.randint(len(choice), (n,))]
        reals, markers = _real_stains(measured, drawn) if here.any() else (cells[:0], drawn[:0])
        images, towards = batch.images, drawn[: len(cells)]
        cells, towards, reals, markers = (t.to(images.device) for t in (cells, towards, reals, markers))
        return Views(images[cells, self.sources[0]][:, None], towards, images[reals, markers][:, None], markers)

    def draw_same(self, batch: Batch) -> Views:
        """Draw, the same whenever it is asked: for held-out cells."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return self.draw(batch)

    def _recall(self, batch: Batch) -> tuple[Views, Sequence[Tensor]]:
        """Return what the generator has just seen and made of this batch, or else make it anew."""
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] is batch:
            return kept[1], kept[2]
        views = self.draw(batch)
        if not len(views.sources) or not len(views.reals):
            return views, []
        with torch.no_grad():
            return views, self.fake(views)

    def _nothing(self, player: str) -> LossTerms:
        """Return a zero on the graph of a player's parameters."""
        return no_terms(p for group in self.stages[0].groups[player] for p in group.parameters)

    def judge(
        self, discriminator: PatchDiscriminator, real: Tensor, markers: Tensor, fake: Tensor, towards: Tensor
    ) -> LossTerms:
        """Return the terms of one discriminator and the share of real and of fake patches that it tells right."""
        c = self.config
        real = real.detach().requires_grad_(c.r1_weight > 0)
        of_real, of_fake = discriminator(real, markers), discriminator(fake, towards)
        return discriminator_terms(of_real, of_fake, c.adversarial, r1=c.r1_weight, images=real)

    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        """Predict stains from the source, in images of any size from 8 px on.

        The source itself, asked for, is returned as it is. Where `measured` does not mark it, it counts as black.
        """
        source = self.sources[0]
        given = torch.where(measured[:, source, None, None], images[:, source].float(), 0)
        out = images.new_zeros(len(images), len(targets), *images.shape[2:], dtype=torch.float32)
        for t, target in enumerate(targets):
            marker = torch.full((len(images),), target, device=images.device)
            out[:, t] = given if target == source else self.generator(given[:, None], marker)[:, 0]
        return Prediction(out)

    def signs(self, values: Mapping[str, float]) -> list[str]:
        """Tell where a discriminator has won or runs away, and where it was never asked."""
        source = self.panel.markers[self.sources[0]]
        rest = signs_of_rest(values, f"{source} and another stain")
        return [*rest, *signs_of_defeat(values, self.config.adversarial, "method.r1_weight")]


def made_discriminator(config: CutConfig | CycleGanConfig, markers: int) -> PatchDiscriminator:
    """Return a discriminator of single stains; without the papers' instance norm where R1 is to bound its slope.

    What follows an instance norm does not change with the contrast of the image: near a dim image it is steep.
    """
    norm: Literal["none", "instance"] = "none" if config.r1_weight else "instance"
    return PatchDiscriminator(1, config.discriminator_channels, markers=markers, norm=norm)


def _parameters(networks: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for network in networks for p in network.parameters()]


def _real_stains(measured: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Find for each drawn marker a cell that shows it, each such cell about as often; return cells and markers."""
    cells = torch.empty_like(drawn)
    for marker in drawn.unique().tolist():
        rows, showing = (drawn == marker).nonzero()[:, 0], measured[:, marker].nonzero()[:, 0]
        shuffled = showing[torch.randperm(len(showing))]
        cells[rows] = shuffled[torch.arange(len(rows)) % len(showing)]
    return cells, drawn
