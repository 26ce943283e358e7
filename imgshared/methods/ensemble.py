"""An ensemble: several trained models of one configuration, told apart by their seeds.

It predicts their mean, and as scale the standard deviation of their mixture (Lakshminarayanan, Pritzel & Blundell 2017,
section 2.4): where the members disagree, the data did not settle what the stain looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from imgshared.methods.base import Method, Stage
from imgshared.types import Batch, LossTerms, Prediction


class Ensemble(Method):
    """Trained members, drawn together.

    It has no latents, for members' latents share no axes, and no sharp output, for a mean of textures is none.

    Parameters
    ----------
    members
        Methods of the same configuration and panel, at least two.
    """

    scaled = True

    def __init__(self, members: Sequence[Method]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        first = members[0]
        self.sources, self.targets = first.sources, first.targets
        self.any_size, self.global_statistics = first.any_size, first.global_statistics
        self.most_proteins = first.most_proteins

    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        """Return the mean over members, and sqrt(mean of scales^2 + variance of means)."""
        members = cast(Sequence[Method], self.members)
        drawn = [member.translate(images, measured, targets) for member in members]
        means = torch.stack([p.mean.float() for p in drawn])
        variance = means.var(0, correction=0)
        scales = [p.scale.float().square() for p in drawn if p.scale is not None]
        if scales:
            variance = variance + torch.stack(scales).mean(0)
        return Prediction(means.mean(0), variance.sqrt())

    @property
    def stages(self) -> Sequence[Stage]:
        """None: its members are trained one by one."""
        return ()

    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Refuse: see `stages`."""
        raise TypeError("an ensemble's members are trained one by one")

    def validate(self, batch: Batch) -> LossTerms:
        """Refuse: see `stages`."""
        raise TypeError("an ensemble's members are validated one by one")
