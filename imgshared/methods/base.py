"""What the loop, prediction and evaluation ask of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from imgshared.data.panel import Panel
from imgshared.models.latents import LatentTable
from imgshared.types import Batch, InputError, Latents, LossTerms, Prediction


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and Adam's betas."""

    parameters: Sequence[nn.Parameter]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Stage:
    """A part of training.

    Parameters
    ----------
    name
        What it learns, for the log.
    epochs
        At most so many.
    groups
        What Adam updates, by player, in the order in which the players move; every other parameter is frozen. A player
        without parameters moves without a gradient: its `loss` does all.
    tables
        Free latents that are updated with their learning rate.
    validated
        Whether held-out cells can be looked at: `validate` and `translate` work in this stage.
    monitored
        Whether `validate` tells better from worse: the held-out loss then chooses the best checkpoint and may end the
        stage. Otherwise the best checkpoint is the end of the training.
    augment
        Whether the batches may be augmented.
    lr_decay
        The last part of the stage, in [0, 1], over which the learning rates fall linearly to zero.
    whole
        Whether an epoch goes on to its last cell, with a smaller batch. Otherwise the cells that fill no batch wait for
        the next epoch's shuffle.
    """

    name: str
    epochs: int
    groups: Mapping[str, Sequence[ParameterGroup]]
    tables: Sequence[tuple[LatentTable, float]] = field(default_factory=tuple)
    validated: bool = True
    monitored: bool = True
    augment: bool = True
    lr_decay: float = 0.0
    whole: bool = False

    @property
    def learns(self) -> bool:
        """Whether it learns by steps; a closed form does not, and so cannot diverge."""
        return any(self.groups.values())


FEW_CELLS = 100  # of a marker, or with it and what it is predicted from, below which a user is warned
UNPAIRED = "learn from unpaired cells with configs/translator_unpaired.yaml, configs/cut.yaml or configs/cyclegan.yaml"


class Method(nn.Module, ABC):
    """A translation method: its networks, its losses, how it translates.

    A training step of the loop, for the current stage::

        method.start(stage)
        for player in stage.groups:
            method.turn(player)
            method.loss(batch, player).total.backward()
        for table, lr in stage.tables:
            table.step(lr)
        for player in stage.groups:
            optimizers[player].step()

    Attributes
    ----------
    sources
        The channels that it predicts from, where it is bound to some; None: any subset predicts any other stain.
    targets
        The channels that it can predict, where these are not all.
    any_size
        Whether it translates images of any size, not crops alone.
    global_statistics
        Whether each pixel depends on statistics of all of the image, as after instance normalisation.
    sharp
        Whether its predictions have a sharp output beside the mean.
    most_proteins
        The most proteins of a cell that its training shows it at once; None: as many as a cell has.
    scaled
        Whether they have a scale, the expected deviation of each pixel.
    settles
        Whether there is something that it fits on held-out cells once its weights stand, see `settle`.
    world
        How many processes share each batch; the loop sets it.
    progress
        The part of the stage that is done, in [0, 1]; the loop keeps it up to date.
    """

    tables: Mapping[str, LatentTable] = MappingProxyType({})  # a loaded method has none
    stage: Stage
    sources: tuple[int, ...] | None = None
    targets: tuple[int, ...] | None = None
    any_size: bool = False
    global_statistics: bool = False
    sharp: bool = False
    most_proteins: int | None = None
    scaled: bool = False
    settles: bool = False
    world: int = 1
    progress: float = 0.0

    @property
    @abstractmethod
    def stages(self) -> Sequence[Stage]:
        """The stages in order."""

    def start(self, stage: Stage) -> None:
        """Freeze what the stage does not train, batch statistics included."""
        self.stage = stage
        trained = {id(p) for groups in stage.groups.values() for group in groups for p in group.parameters}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        for module in self.modules():
            module.training = any(id(p) in trained for p in module.parameters())

    def turn(self, player: str) -> None:
        """Let one player of the stage move; the others' networks pass gradients on and gather none."""
        for name, groups in self.stage.groups.items():
            for group in groups:
                for parameter in group.parameters:
                    parameter.requires_grad_(name == player)

    def prepare(self, measured: Tensor, seed: int) -> None:
        """Make whatever belongs to single training cells; `measured` is (N, C) bool of the training cells in order.

        Raises
        ------
        InputError
            Where the method cannot learn from such cells.
        """
        self.tables = {}

    @abstractmethod
    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Return the training loss of a batch for one player of the current stage.

        Its `count` is 0 where the batch has nothing to tell the player, which then does not move. Parts named
        ``adversarial`` are moves of a game, not a measure of success: the loop leaves them out where it looks for
        divergence.
        """

    @abstractmethod
    def validate(self, batch: Batch) -> LossTerms:
        """Return the held-out loss of cells that were not trained on; lower is better.

        Its `count` is 0 where the batch holds nothing that could be judged.
        """

    def settle(self, batches: Iterable[Batch], total: Callable[[Tensor], Tensor]) -> str:
        """Fit on held-out cells what is fitted once the weights stand, and say what came of it.

        `total` sums a tensor over the processes.
        """
        return ""

    @abstractmethod
    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        """Predict the `targets` (channels) from the stains that `measured` marks, and from nothing else."""

    def doubts(self, measured: Tensor, markers: Sequence[str]) -> list[str]:
        """Return what a user should know before a training on cells that show these stains (N, C): a sentence each."""
        return []

    def signs(self, values: Mapping[str, float]) -> list[str]:
        """Return what a user should know of the mean loss terms of the last epoch: one sentence a trouble."""
        return []


class LatentMethod(Method):
    """A method that tells what the stains of a cell share from what is specific to each."""

    @abstractmethod
    def encode(self, images: Tensor, measured: Tensor) -> Latents:
        """Return the latents of (B, C, Y, X) images, from the stains that `measured` (B, C) marks."""

    @abstractmethod
    def reconstruct(self, images: Tensor, measured: Tensor, *, specific: bool) -> Tensor:
        """Rebuild each measured stain from its own latents, with or without the specific one; (B, C, Y, X)."""


def sum_terms(parts: Mapping[str, Tensor], count: int | None = None) -> LossTerms:
    """Sum weighted terms, at least one; the parts are detached for the log."""
    total = torch.stack([p.float() for p in parts.values()]).sum()
    return LossTerms(total, {k: v.detach() for k, v in parts.items()}, count)


def no_terms(parameters: Iterable[nn.Parameter]) -> LossTerms:
    """Return a zero on the graph of the parameters: the loss of a batch that has nothing to tell."""
    return LossTerms(torch.stack([0 * p.float().sum() for p in parameters]).sum(), {}, count=0)


def refuse_unpaired(panel: Panel, measured: Tensor, sources: Sequence[int], name: str) -> None:
    """Refuse training cells of which none shows all `sources` together with some other stain.

    Raises
    ------
    InputError
        Names the first stain without pairs and the configurations that need none.
    """
    whole = measured[:, list(sources)].all(1)
    for target in (c for c in range(len(panel)) if c not in sources):
        if not (whole & measured[:, target]).any():
            names = ", ".join(panel.markers[c] for c in sources)
            without = "leave the marker out (markers=...), or "
            raise InputError(
                f"{name} learns from cells that show {names} and {panel.markers[target]} together, and no training "
                f"cell does: {'' if target == panel.chromatin_index else without}{UNPAIRED}"
            )


def with_partner(measured: Tensor, chromatin: int) -> Tensor:
    """(N,) bool: which cells of (N, C) `measured` show chromatin and another stain."""
    return measured[:, chromatin] & (measured.sum(1) > 1)


def never_joined(measured: Tensor, chromatin: int, markers: Sequence[str]) -> list[str]:
    """Say of each stain that no chain of (N, C) `measured` cells joins with chromatin that it cannot be told from it.

    Joined is what some cell shows beside chromatin, or beside a stain that is joined itself.
    """
    beside = measured.T.float() @ measured.float() > 0
    reached, further = torch.zeros_like(beside[chromatin]), beside[chromatin]
    while not torch.equal(further, reached):
        reached, further = further, beside[further].any(0)
    return [
        f"{marker}: no training cell shows it beside {markers[chromatin]} or a stain that others show beside "
        f"{markers[chromatin]}, so nothing teaches to predict it from there"
        for marker, apart in zip(markers, measured.any(0) & ~reached, strict=True)
        if apart
    ]


def refuse_without_partner(measured: Tensor, chromatin: int, name: str) -> None:
    """Refuse training cells of which none shows chromatin together with another stain.

    Raises
    ------
    InputError
        Names the configurations that need no such cells.
    """
    if not with_partner(measured, chromatin).any():
        raise InputError(
            f"{name} learns what stains share from cells that show chromatin and another stain together, and no "
            f"training cell does: {UNPAIRED}"
        )
