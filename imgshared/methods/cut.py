"""CUT and FastCUT: patches of a translation find their patches in the source (Park, Efros, Zhang & Zhu, ECCV 2020).

One generator G and one discriminator D of the target stains; the contrastive loss takes the place of the way back that
CycleGAN learns. FastCUT is `nce_weight` 10, `identity_weight` 0 and `flip_equivariance`.

Unlike the published code: generator and discriminator are CycleGAN's, with strided convolutions where CUT's resample
with a blur against aliasing; the generator has 6 blocks by default where CUT's has 9; all weights start from
N(0, 0.02^2), as in CycleGAN, where CUT draws them by Xavier's rule with a gain of 0.02; and both players move at once,
by gradients of the same step, where CUT's discriminator moves first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imgshared.config import CutConfig
from imgshared.data.panel import Panel
from imgshared.losses import adversarial_generator, patch_nce
from imgshared.methods.base import sum_terms
from imgshared.methods.unpaired import UnpairedMethod, Views
from imgshared.models.patches import PatchProjection, sample_positions
from imgshared.models.resnet import LEVELS
from imgshared.types import Batch, InputError, LossTerms


class Cut(UnpairedMethod):
    """CUT, with the marker as a condition of generator and discriminator where there are several.

    The generator lowers, as in the published code,
    ``adversarial(G(x)) + nce_weight * (NCE(x, G(x)) + identity_weight * NCE(y, G(y))) / (1 + identity_weight)``
    with x the source and y a real stain of the marker that x is translated to: its lambda_NCE is `nce_weight`, and it
    halves the sum of the two NCE terms where there are both. Each is the mean over `nce_layers` of eq. 4 of the paper.

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
        As `UnpairedMethod`; for levels that the generator does not have.
    """

    config: CutConfig

    def __init__(self, config: CutConfig, *, panel: Panel, crop_px: int) -> None:
        super().__init__(config, panel, crop_px)
        layers = config.nce_layers
        if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(LEVELS)):
            raise InputError(
                f"method.nce_layers = {list(layers)}: name some of 0 (the image), 1 and 2 (the halvings), 3 (the first "
                "residual block) and 4 (the middle one), each once"
            )
        self.projection = PatchProjection([self.generator.widths[layer] for layer in layers])

    def players(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The projection of the patches learns with the generator."""
        return [self.generator, self.projection], [self.discriminator]

    def generator_loss(self, views: Views) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        """Adversarial and contrastive terms of the translations, contrastive term of the identity."""
        c = self.config
        flipped = c.flip_equivariance and bool(torch.rand(()) < 0.5)
        weight = c.nce_weight / (1 + c.identity_weight)
        parts, fakes = {}, []
        if len(views.sources):
            fake = self._translate(views.sources, views.towards, flipped)
            fakes.append(fake)
            judged = self.discriminator(fake, views.towards)
            parts["adversarial"] = adversarial_generator(judged, c.adversarial)
            if weight:
                parts["nce"] = weight * self._nce(views.sources, fake, views.towards, flipped)
        if len(views.reals) and weight * c.identity_weight:
            same = self._translate(views.reals, views.markers, flipped)
            parts["nce_identity"] = weight * c.identity_weight * self._nce(views.reals, same, views.markers, flipped)
        return parts, fakes

    def fake(self, views: Views) -> Sequence[Tensor]:
        """Translate the sources, not flipped."""
        return [self._translate(views.sources, views.towards, False)]

    def discriminator_loss(self, views: Views, fakes: Sequence[Tensor]) -> LossTerms:
        """Real stains against the translations."""
        return self.judge(self.discriminator, views.reals, views.markers, fakes[0], views.towards)

    def validate(self, batch: Batch) -> LossTerms:
        """NCE of held-out sources: whether translations keep their structure, not whether they look like the stain."""
        views = self.draw_same(batch)
        if not len(views.sources):
            return LossTerms(batch.images.new_zeros(()), {}, count=0)
        fake = self._translate(views.sources, views.towards, False)
        return sum_terms({"nce": self._nce(views.sources, fake, views.towards, False)}, count=len(fake))

    def _translate(self, images: Tensor, markers: Tensor, flipped: bool) -> Tensor:
        translated: Tensor = self.generator(images.flip(3) if flipped else images, markers)
        return translated

    def _nce(self, images: Tensor, translated: Tensor, markers: Tensor, flipped: bool) -> Tensor:
        """PatchNCE of images and their translations, which are mirrored where `flipped` (FastCUT).

        Both go through the encoder under the marker translated to: for each marker its generator is the paper's one.
        """
        c = self.config
        queries = self.generator.features(translated, c.nce_layers, markers)
        if flipped:
            queries = [query.flip(3) for query in queries]
        keys = self.generator.features(images, c.nce_layers, markers)
        positions = sample_positions(keys, c.patches)
        pairs = zip(self.projection(queries, positions), self.projection(keys, positions), strict=True)
        losses = [patch_nce(q, k, temperature=c.temperature, negatives=c.negatives) for q, k in pairs]
        return torch.stack(losses).mean()
