"""What linear, regression and pix2pix share: bound to source stains, they learn from cells that show both sides."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imgshared.config import LinearConfig, Pix2pixConfig, RegressionConfig
from imgshared.data.panel import Panel
from imgshared.methods.base import FEW_CELLS, Method, refuse_unpaired
from imgshared.types import Batch, InputError, Prediction

KNOWN = 1e-6  # standard deviation of a source "predicted" from itself


class Pairs(NamedTuple):
    """The n cells of a batch that show all sources and some target, T targets in all, P pairs.

    Parameters
    ----------
    sources, targets
        (n, S, Y, X) and (n, T, Y, X) images; a target is zero where not measured.
    shown
        (n, T) bool, with P True: which targets are measured.
    """

    sources: Tensor
    targets: Tensor
    shown: Tensor


class PairedMethod(Method):
    """Some sources to every other marker of the panel.

    Parameters
    ----------
    config
        Its `sources`: names or aliases; None for chromatin.
    panel
        The model's.

    Attributes
    ----------
    sources, targets
        Channels; together all of the panel.

    Raises
    ------
    InputError
        For unknown sources, or where no other marker is left.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    config: LinearConfig | RegressionConfig | Pix2pixConfig

    any_size = True

    def __init__(self, config: LinearConfig | RegressionConfig | Pix2pixConfig, panel: Panel) -> None:
        super().__init__()
        self.config, self.panel = config, panel
        self.sources = tuple(dict.fromkeys(panel.indices(config.sources or [panel.chromatin])))
        self.targets = tuple(c for c in range(len(panel)) if c not in self.sources)
        if not self.targets:
            raise InputError(
                f"method.sources: {', '.join(panel.markers)} are all markers of the panel, nothing is left to predict"
            )

    def prepare(self, measured: Tensor, seed: int) -> None:
        """Refuse cells among which a target is never seen together with the sources."""
        super().prepare(measured, seed)
        refuse_unpaired(self.panel, measured, self.sources, self.config.name)

    def doubts(self, measured: Tensor, markers: Sequence[str]) -> list[str]:
        """Name the targets that few cells show together with the sources, where more cells show them at all."""
        whole, sources = measured[:, list(self.sources)].all(1), ", ".join(markers[c] for c in self.sources)
        pairs, alone = measured[whole].sum(0).tolist(), measured.sum(0).tolist()
        return [
            f"{markers[c]}: {pairs[c]} of the {alone[c]} training cells that show it show {sources}, too, and "
            f"{self.config.name} learns from these alone: expect little of it"
            for c in self.targets
            if pairs[c] < min(FEW_CELLS, alone[c])
        ]

    def pairs(self, batch: Batch) -> Pairs:
        """Return the cells to learn from; there may be none."""
        sources, targets = list(self.sources), list(self.targets)
        shown = batch.measured[:, targets] & batch.measured[:, sources].all(1, keepdim=True)
        rows = shown.any(1)
        images = batch.images[rows]
        return Pairs(images[:, sources], images[:, targets], shown[rows])

    @abstractmethod
    def predict(self, sources: Tensor) -> Prediction:
        """Predict all targets, in order, from (B, S, Y, X) sources."""

    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        """Predict stains from the sources, in images of any size.

        A source asked for is returned as it is. A source that `measured` does not mark counts as black.
        """
        sources = list(self.sources)
        given = torch.where(measured[:, sources, None, None], images[:, sources].float(), 0)
        predicted = self.predict(given)
        order = [(*self.sources, *self.targets).index(target) for target in targets]
        mean = torch.cat([given, predicted.mean], 1)[:, order]
        if predicted.scale is None:
            return Prediction(mean)
        return Prediction(mean, torch.cat([torch.full_like(given, KNOWN), predicted.scale], 1)[:, order])
