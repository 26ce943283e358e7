"""linear: ridge regression of a stain's pixel on Gaussian blurs of the sources; the floor every method must clear."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from imgshared.config import LinearConfig
from imgshared.data.panel import Panel
from imgshared.losses import pixel_loss
from imgshared.methods.base import Stage, sum_terms
from imgshared.methods.paired import PairedMethod
from imgshared.models.ridge import BlurredRidge, fitting
from imgshared.types import Batch, InputError, LossTerms, Prediction


class Linear(PairedMethod):
    """Ridge regression on blurs, fitted in closed form in one pass over the training cells.

    Parameters
    ----------
    config
        Sources, blurs, penalty and pixels.
    panel
        The model's.
    crop_px
        Side of the training crops: a blur wider than half of it is left out, for larger images too.

    Raises
    ------
    InputError
        Where no blur fits the crops; for unknown sources.
    """

    config: LinearConfig

    def __init__(self, config: LinearConfig, *, panel: Panel, crop_px: int) -> None:
        super().__init__(config, panel)
        sigmas = fitting(config.sigmas, crop_px)
        if not sigmas:
            raise InputError(
                f"method.sigmas: every blur is wider than half a crop of {crop_px} px: use 0 to {crop_px // 2}"
            )
        self.ridge = BlurredRidge(
            len(self.sources), len(self.targets), sigmas, ridge=config.ridge, pixels=config.pixels
        )

    @property
    def stages(self) -> Sequence[Stage]:
        """One pass, without a gradient, that shows every cell."""
        return [Stage("fit", 1, {"closed form": []}, whole=True)]

    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Take the batch in and return the mean squared error on it of the fit so far; no term where it has no pair."""
        pairs = self.pairs(batch)
        equations = self.ridge.equations(pairs.sources, pairs.targets, pairs.shown)
        if self.world > 1:  # so that each keeps the same fit
            for part in equations:
                dist.all_reduce(part)
        self.ridge.add(equations)
        pixels = int(equations.xx[:, -1, -1].sum())
        if not pixels:
            return LossTerms(batch.images.new_zeros(()), {}, count=0)
        return sum_terms({"l2": self.ridge.squared_error(equations)}, count=pixels)

    def validate(self, batch: Batch) -> LossTerms:
        """Mean squared error over the measured targets of cells that show all sources."""
        pairs = self.pairs(batch)
        if not len(pairs.shown):
            return LossTerms(batch.images.new_zeros(()), {}, count=0)
        predicted = self.ridge(pairs.sources)[pairs.shown]
        return sum_terms({"l2": pixel_loss(predicted, pairs.targets[pairs.shown], "l2")}, count=len(predicted))

    def predict(self, sources: Tensor) -> Prediction:
        """Predict by the fit so far."""
        return Prediction(self.ridge(sources))
