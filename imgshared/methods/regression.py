"""regression: a U-Net from the sources to every other stain (Ronneberger, Fischer & Brox 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from imgshared.config import RegressionConfig
from imgshared.data.panel import Panel
from imgshared.losses import pixel_loss
from imgshared.methods.base import ParameterGroup, Stage, no_terms, sum_terms
from imgshared.methods.paired import PairedMethod
from imgshared.models.bounds import LOG_SCALE, soft_bound
from imgshared.models.unet import UNet, check_fits
from imgshared.types import Batch, LossTerms, Prediction


class Regression(PairedMethod):
    """The expected image of each stain; with a "laplace" or "gaussian" error also the spread of each pixel.

    Parameters
    ----------
    config
        Sources, sizes, error and optimisation.
    panel
        The model's.
    crop_px
        Side of the training crops; translation takes images of any size.

    Raises
    ------
    InputError
        Where the network does not fit the crops; for unknown sources.
    """

    config: RegressionConfig

    def __init__(self, config: RegressionConfig, *, panel: Panel, crop_px: int) -> None:
        super().__init__(config, panel)
        # 2 px a side innermost: BatchNorm needs more than one value of a channel, even where a batch has one pair
        check_fits(crop_px, 2 ** len(config.channels), config.channels)
        self.scaled = config.error in ("laplace", "gaussian")
        self.network = UNet(len(self.sources), len(self.targets) * (1 + self.scaled), config.channels)

    @property
    def stages(self) -> Sequence[Stage]:
        """One."""
        c = self.config
        groups = {"generator": [ParameterGroup(list(self.parameters()), c.lr)]}
        return [Stage("regression", c.epochs, groups, lr_decay=c.lr_decay)]

    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Mean over pixels and measured targets of the error or the negative log-likelihood; see `pixel_loss`."""
        return self._loss(batch)

    def validate(self, batch: Batch) -> LossTerms:
        """Return the loss of held-out cells; its count is that of their pairs."""
        return self._loss(batch)

    def _loss(self, batch: Batch) -> LossTerms:
        pairs = self.pairs(batch)
        if not len(pairs.shown):
            return no_terms(self.parameters())
        mean, log_scale = self._run(pairs.sources)
        mean, log_scale = mean[pairs.shown], None if log_scale is None else log_scale[pairs.shown]
        error = pixel_loss(mean, pairs.targets[pairs.shown], self.config.error, log_scale)
        return sum_terms({self.config.error: error}, count=len(mean))

    def predict(self, sources: Tensor) -> Prediction:
        """Predict means and, where the error has a scale, standard deviations; sqrt(2) b of a Laplace distribution."""
        mean, log_scale = self._run(sources)
        if log_scale is None:
            return Prediction(mean)
        return Prediction(mean, log_scale.exp() * (math.sqrt(2) if self.config.error == "laplace" else 1.0))

    def _run(self, sources: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, S, Y, X) to means and log scales, each (B, T, Y, X) float32."""
        out = self.network(sources).float()
        if not self.scaled:
            return out, None
        mean, raw = out.chunk(2, 1)
        return mean, soft_bound(raw, *LOG_SCALE)
