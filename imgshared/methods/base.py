"""What the loop, prediction and evaluation ask of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from imgshared.models.latents import LatentTable
from imgshared.types import Batch, Latents, LossTerms, Prediction


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[nn.Parameter]
    lr: float


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
        What Adam updates, by player; every other parameter is frozen.
    tables
        Free latents that are updated with their learning rate.
    monitored
        Whether `validate` means something: the held-out loss then chooses the best checkpoint and may end the stage.
    augment
        Whether the batches may be augmented.
    """

    name: str
    epochs: int
    groups: Mapping[str, Sequence[ParameterGroup]]
    tables: Sequence[tuple[LatentTable, float]] = field(default_factory=tuple)
    monitored: bool = True
    augment: bool = True


class Method(nn.Module, ABC):
    """A translation method: its networks, its losses, how it translates.

    A training step of the loop, for the current stage::

        method.start(stage)
        for player in stage.groups:
            terms = method.loss(batch, player)
            terms.total.backward()
            optimizers[player].step()
        for table, lr in stage.tables:
            table.step(lr)
    """

    tables: Mapping[str, LatentTable]
    stage: Stage

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

    def prepare(self, measured: Tensor, seed: int) -> None:
        """Make whatever belongs to single training cells; `measured` is (N, C) bool of the training cells in order."""
        self.tables = {}

    @abstractmethod
    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Return the training loss of a batch in the current stage."""

    @abstractmethod
    def validate(self, batch: Batch) -> LossTerms:
        """Return the held-out loss of cells that were not trained on; lower is better."""

    @abstractmethod
    def encode(self, images: Tensor, measured: Tensor) -> Latents:
        """Return the latents of (B, C, Y, X) images, from the stains that `measured` (B, C) marks."""

    @abstractmethod
    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        """Predict the `targets` (channels) from the stains that `measured` marks, and from nothing else."""

    @abstractmethod
    def reconstruct(self, images: Tensor, measured: Tensor, *, specific: bool) -> Tensor:
        """Rebuild each measured stain from its own latents, with or without the specific one; (B, C, Y, X)."""
