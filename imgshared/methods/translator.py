"""translator: shared and specific maps of every stain; any subset of a cell's stains predicts any other.

Each stain is encoded to a pyramid of maps, of which a fixed share of the channels is shared and the rest specific. The
shared maps of the visible stains are fused; a decoder draws every stain from the fused maps and its own specific ones,
or from a learnt code where that stain is absent. Hiding stains in training makes it predict what it was not shown;
patch contrast, cycle and adversarial terms let it learn from cells that were never stained together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from imgshared import losses
from imgshared.config import TranslatorConfig
from imgshared.data.panel import Panel
from imgshared.methods.base import ParameterGroup, Stage, never_joined, no_terms, sum_terms
from imgshared.methods.draws import (
    at_most,
    draw_targets,
    few,
    first_of_each,
    list_stains,
    rows_showing,
    show,
    some,
)
from imgshared.methods.game import BETAS, discriminator_terms, signs_of_defeat, signs_of_rest
from imgshared.methods.maps import MapMethod, size_of
from imgshared.methods.posterior import signs_of_collapse, spread_of_kl
from imgshared.methods.step import Step, Translated
from imgshared.models.discriminator import PatchDiscriminator, check_fits
from imgshared.models.patches import PatchProjection, sample_positions
from imgshared.models.pyramid import TimmPyramid, statistics_kept
from imgshared.models.translation import Maps
from imgshared.types import Batch, InputError, LossTerms

LEAST_ROWS = 8  # of a marker in a part of a batch, below which dependence is not estimated
SELDOM = 0.1  # of the steps


class Translator(MapMethod):
    """The translator.

    Of a stain translated to itself there are two terms: `identity` is CycleGAN's, an L1 error (Zhu et al. 2017, section
    5.2), `patch_nce_identity` is CUT's, patch contrast (Park et al. 2020, section 3.3). Unlike in CUT, a translation is
    read by the encoder of its own marker, not by that of its source, for it is a stain like any other here.

    Parameters
    ----------
    config
        Sizes, terms and their weights.
    panel
        The markers.
    crop_px
        Side of the training crops.

    Raises
    ------
    InputError
        For a discriminator or a backbone that does not fit the crops, an unknown backbone.
    """

    def __init__(self, config: TranslatorConfig, *, panel: Panel, crop_px: int) -> None:
        super().__init__(config, panel)
        self.weights, self.most_proteins = config.weights, config.visible_proteins
        if crop_px <= self.network.multiple:  # BatchNorm needs more than one value of a channel, even of one stain
            raise InputError(
                f"method.channels: {len(config.channels)} levels halve the image to 1/{self.network.multiple}, crops "
                f"are {crop_px} px: name fewer"
            )
        for encoder in self.network.encoders:
            if isinstance(encoder, TimmPyramid):
                encoder.check_fits(self.network.multiple * -(-crop_px // self.network.multiple))
        self.discriminator = self.projection = None
        if self.weights.adversarial:
            check_fits(crop_px, config.discriminator_channels)
            inputs = 1 + config.discriminator_sees_source
            self.discriminator = PatchDiscriminator(
                inputs, config.discriminator_channels, markers=len(panel), norm="none"
            )
        if self.weights.patch_nce or self.weights.patch_nce_identity:
            self.projection = PatchProjection(self.network.widths)
        self._kept: Translated | None = None
        self._estimated = Counter[int]()  # steps in which a marker's dependence was, and -1: all of an epoch

    @property
    def _sees_source(self) -> bool:
        return self.discriminator is not None and self.config.discriminator_sees_source

    @property
    def stages(self) -> Sequence[Stage]:
        """One stage; the discriminator is a second player.

        With an adversarial term its best checkpoint is its end: the held-out error prefers blur to what that teaches.
        """
        c = self.config
        groups = {"generator": [ParameterGroup(self._generator_parameters(), c.lr)]}
        if self.discriminator is not None:
            groups["discriminator"] = [ParameterGroup(list(self.discriminator.parameters()), c.lr_discriminator, BETAS)]
        monitored = self.paired and not self.weights.adversarial
        return [Stage("translator", c.epochs, groups, monitored=monitored, lr_decay=c.lr_decay)]

    def _generator_parameters(self) -> list[nn.Parameter]:
        return [*self.network.parameters(), *(self.projection.parameters() if self.projection else ())]

    def prepare(self, measured: Tensor, seed: int) -> None:
        """Refuse terms that need cells with two stains, or with chromatin and another, where there are none.

        Raises
        ------
        InputError
            Names the term and the configuration that fits.
        """
        super().prepare(measured, seed)
        w, several = self.weights, (measured.sum(1) > 1).any()
        for term in ("cross", "sharp", "agreement"):
            if getattr(w, term) and not several:
                raise InputError(
                    f"method.weights.{term} needs cells with two stains, and no training cell has two: set it to 0 and "
                    "learn from unpaired cells by patch_nce, cycle and adversarial, as configs/translator_unpaired.yaml"
                )
        if not (w.adversarial or w.patch_nce or w.cycle or several):
            raise InputError(
                "no training cell has two stains and no term translates between cells, so no stain would be predicted "
                "from another: learn by patch_nce, cycle and adversarial, as configs/translator_unpaired.yaml"
            )
        if self._sees_source and not self.paired:
            raise InputError(
                "method.discriminator_sees_source needs cells that show chromatin and another stain, and no training "
                "cell does: set it to false, as configs/translator_unpaired.yaml"
            )

    def doubts(self, measured: Tensor, markers: Sequence[str]) -> list[str]:
        """Say what is never taught: to draw from specific maps; to predict stains that nothing joins with chromatin."""
        w = self.weights
        unread = "nothing teaches to draw from specific maps, so that full reconstructions mean nothing"
        said = [] if w.full else [f"method.weights.full=0: {unread}"]
        translates = w.adversarial and (w.patch_nce or w.cycle) and not self._sees_source
        if translates or (self.paired and not w.cross):
            return said
        remedy = (
            "patch_nce or cycle with adversarial and method.discriminator_sees_source=false could, as in "
            "configs/translator_unpaired.yaml"
        )
        return said + [f"{apart}; {remedy}" for apart in never_joined(measured, self.panel.chromatin_index, markers)]

    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Return the weighted terms of the generator, or the discriminator's loss on the same translations.

        Where `kl` has a weight, the KL of each channel of the cells' fused maps is watched (`spread_of_kl`).
        """
        return self._discriminator_loss(batch) if player == "discriminator" else self._generator_loss(batch)

    def _generator_loss(self, batch: Batch) -> LossTerms:
        if not batch.measured.any():
            return no_terms(self._generator_parameters())
        step, w = self._begin(batch), self.weights
        terms: list[tuple[float, str, Callable[[Step], Tensor]]] = [
            (w.full, "full", self._full),
            (w.shared, "shared", self._shared),
            (w.cross, "cross", self._cross),
            (w.agreement, "agreement", self._agreement),
            (w.independence, "independence", self._independence),
            (w.norm, "norm", self._norm),
            (w.kl, "kl", self._kl),
            (w.identity, "identity", self._identity),
            (w.patch_nce_identity, "patch_nce_identity", self._patch_nce_identity),
        ]
        parts = {name: weight * term(step) for weight, name, term in terms if weight}
        self._kept = None
        if (w.adversarial or w.patch_nce or w.cycle) and self.progress >= self.config.translation_from:
            parts |= self._translation_terms(step)
        summed = sum_terms(parts) if parts else no_terms(self._generator_parameters())
        watched = spread_of_kl(zip(step.fused.shared, step.fused.log_std, strict=True)) if w.kl else {}
        return replace(summed, parts={**summed.parts, **watched})

    def _begin(self, batch: Batch) -> Step:
        """Draw stains, hide some, encode the visible ones and fuse their shared maps."""
        c = self.config
        chromatin = self.panel.chromatin_index
        shown = show(batch.measured, chromatin, chromatin_only=c.chromatin_only, hide=c.hide,
                     proteins=c.visible_proteins)  # fmt: skip
        hidden = at_most(batch.measured & ~shown, c.hidden_proteins)
        stains = list_stains(shown, hidden, chromatin)
        visible = stains.visible
        all_of_them = self.weights.agreement or self.weights.independence
        encoded = torch.arange(len(visible), device=visible.device) if all_of_them else visible.nonzero()[:, 0]
        maps = self.network.encode(batch.images[stains.cells[encoded], stains.channels[encoded], None],
                                   stains.channels[encoded])  # fmt: skip
        seen = visible[encoded]
        known = maps.told(seen) if all_of_them else maps
        of = encoded[seen]
        fused = self.network.fuse(known, stains.channels[of], stains.cells[of], len(batch.index))
        return Step(batch, stains, encoded, maps, fused, self.network.shared_path(self._noisy(fused)))

    def _noisy(self, fused: Maps) -> list[Tensor]:
        """Sample the experts, or add the configured noise: in training alone."""
        if fused.log_std:
            return [m + s.exp() * torch.randn_like(m) for m, s in zip(fused.shared, fused.log_std, strict=True)]
        noise = self.config.latent_noise
        return [h + noise * torch.randn_like(h) for h in fused.shared] if noise else list(fused.shared)

    def _drawn(self, step: Step, rows: Tensor, detail: Tensor | None = None) -> Tensor:
        """Error of the stains `rows` drawn from their cells' fused maps, with or without their own detail."""
        cells, channels = step.stains.cells[rows], step.stains.channels[rows]
        if not len(rows):
            return step.trunk.sum() * 0.0
        mean, log_scale = self.network.decode(step.trunk[cells], channels, size_of(step.batch.images), detail)
        return self._error(mean, log_scale, step.batch.images[cells, channels, None])

    def _full(self, step: Step) -> Tensor:
        rows = some(step.stains.visible[step.encoded].nonzero()[:, 0], self.config.rebuilt)
        specific = [h[rows] for h in step.maps.specific]
        noise = self.config.latent_noise
        specific = [h + noise * torch.randn_like(h) for h in specific] if noise else specific
        return self._drawn(step, step.encoded[rows], self.network.own_detail(specific))

    def _shared(self, step: Step) -> Tensor:
        return self._drawn(step, some(step.stains.visible.nonzero()[:, 0], self.config.rebuilt))

    def _cross(self, step: Step) -> Tensor:
        return self._drawn(step, (~step.stains.visible).nonzero()[:, 0])

    def _identity(self, step: Step) -> Tensor:
        """L1 of a visible stain that is translated to itself (CycleGAN's)."""
        rows = step.stains.visible[step.encoded].nonzero()[:, 0]
        cells, channels = step.stains.cells[step.encoded[rows]], step.stains.channels[step.encoded[rows]]
        return losses.pixel_loss(self._itself(step, rows), step.batch.images[cells, channels, None], "l1")

    def _patch_nce_identity(self, step: Step) -> Tensor:
        """Patch contrast of a visible stain that is translated to itself with that stain (CUT's)."""
        rows = few(step.stains.visible[step.encoded].nonzero()[:, 0], self.config.translated)
        itself, channels = self._itself(step, rows), step.stains.channels[step.encoded[rows]]
        with statistics_kept(self.network):
            again = self.network.encode(itself, channels)
        return self._contrast(again, [h[rows] for h in step.maps.shared])

    def _itself(self, step: Step, rows: Tensor) -> Tensor:
        """Draw the encoded stains `rows` from their own shared maps alone."""
        channels = step.stains.channels[step.encoded[rows]]
        trunk = self.network.shared_path(self._alone(step.maps.told(rows), channels).shared)
        return self.network.decode(trunk, channels, size_of(step.batch.images))[0]

    def _agreement(self, step: Step) -> Tensor:
        """Pooled shared latents of two stains of each cell that has two."""
        one, other = step.stains.pairs()
        first = first_of_each(step.batch.index[step.stains.cells[one]])  # a cell drawn twice is not its own stranger
        one, other = one[first], other[first]
        told = self._alone(step.maps, step.stains.channels[step.encoded])
        z = self.network.pool(told.shared, size_of(step.batch.images))
        if self.config.agreement == "triplet":
            return losses.triplet(z[one], z[other])
        return losses.info_nce(z[one], z[other])

    def _independence(self, step: Step) -> Tensor:
        """Mean over the markers of the dependence of shared and specific latents over the cells of the batch."""
        measure = losses.hsic if self.config.independence == "hsic" else losses.cross_covariance
        size = size_of(step.batch.images)
        channels = step.stains.channels[step.encoded]
        shared = self.network.pool(self._alone(step.maps, channels).shared, size)
        specific = self.network.pool(step.maps.specific, size)
        count = channels.bincount(minlength=len(self.panel)).tolist()
        found = [c for c, n in enumerate(count) if n >= LEAST_ROWS]
        self._estimated.update([-1, *found])
        each = [measure(shared[channels == c], specific[channels == c]) for c in found]
        return torch.stack(each).mean() if each else shared.sum() * 0.0

    def _norm(self, step: Step) -> Tensor:
        size = size_of(step.batch.images)
        fused, specific = self.network.pool(step.fused.shared, size), self.network.pool(step.maps.specific, size)
        return losses.latent_norm(fused) + losses.latent_norm(specific)

    def _kl(self, step: Step) -> Tensor:
        """KL of a cell's fused maps, all levels together, over the pixels of its image: as the likelihood is a mean."""
        height, width = size_of(step.batch.images)
        levels = zip(step.fused.shared, step.fused.log_std, strict=True)
        each = [losses.gaussian_kl(m, s) * m[0].numel() / (height * width) for m, s in levels]
        return torch.stack(each).sum()

    def _translation_terms(self, step: Step) -> dict[str, Tensor]:
        """Translate each cell to a stain that it did not show, and judge the image without its real counterpart."""
        w, batch, stains = self.weights, step.batch, step.stains
        shown = stains.mask(len(batch.index), len(self.panel), stains.visible)
        judged, stained = self._judged(shown), self._judged(batch.measured)
        if self._sees_source and not (w.patch_nce or w.cycle):  # what it cannot judge would teach nothing
            cells, channels = draw_targets(stained, judged)
        else:
            cells, channels = draw_targets(batch.measured, shown)
        if not len(cells):
            return {}
        kept = few(torch.arange(len(cells), device=cells.device), self.config.translated)
        cells, channels = cells[kept], channels[kept]
        fake = Translated(batch, cells, channels, self._translated(step, cells, channels))
        images, parts = fake.images, dict[str, Tensor]()
        if w.sharp:
            known = batch.measured[cells, channels]
            error = losses.pixel_loss(images[known], batch.images[cells, channels, None][known], self.config.error)
            parts["sharp"] = w.sharp * (error if known.any() else images.sum() * 0.0)
        rows = (judged[cells].any(1) & stained.any(0)[channels]).nonzero()[:, 0]
        if self.discriminator is not None and len(rows):
            met = Translated(batch, cells[rows], channels[rows], images[rows])
            self._kept = replace(met, images=met.images.detach())
            logits = self._judge(met, self.discriminator)
            parts["adversarial"] = w.adversarial * losses.adversarial_generator(logits, self.config.adversarial)
        if w.patch_nce or w.cycle:
            with statistics_kept(self.network):
                again = self.network.encode(images, channels)
            source = stains.first_visible(len(batch.index))[cells]
            if w.patch_nce:
                parts["patch_nce"] = w.patch_nce * self._patch_nce(step, again, source)
            if w.cycle:
                parts["cycle"] = w.cycle * self._cycle(step, again, source, fake)
        return parts

    def _translated(self, step: Step, cells: Tensor, channels: Tensor) -> Tensor:
        """Draw stains that were not shown: the mean, or where there is one the sharp output, which alone learns."""
        size = size_of(step.batch.images)
        if not self.weights.sharp:
            return self.network.decode(step.trunk[cells], channels, size)[0]
        with torch.no_grad():
            mean, _ = self.network.decode(step.trunk[cells], channels, size)
        texture = self.network.texture_trunk([h[cells] for h in step.fused.shared])
        return self.network.sharpen(mean, texture, channels)

    def _patch_nce(self, step: Step, again: Maps, source: Tensor) -> Tensor:
        """Shared maps of the translation against those of its source, level by level (CUT, eq. 4)."""
        place = step.encoded.new_full((len(step.stains.cells),), -1)
        place[step.encoded] = torch.arange(len(step.encoded), device=place.device)
        return self._contrast(again, [h[place[source]] for h in step.maps.shared])

    def _contrast(self, again: Maps, source: Sequence[Tensor]) -> Tensor:
        assert self.projection is not None
        keys = [h.detach() for h in source]
        positions = sample_positions(keys, self.config.patches)
        pairs = zip(self.projection(again.shared, positions), self.projection(keys, positions), strict=True)
        c = self.config
        each = [losses.patch_nce(q, k, temperature=c.temperature, negatives=c.negatives) for q, k in pairs]
        return torch.stack(each).mean()

    def _cycle(self, step: Step, again: Maps, source: Tensor, fake: Translated) -> Tensor:
        """L1 of the source drawn from its translation alone (Zhu et al. 2017)."""
        channels = step.stains.channels[source]
        with statistics_kept(self.network):
            trunk = self.network.shared_path(self._noisy(self._alone(again, fake.channels)))
        back, _ = self.network.decode(trunk, channels, size_of(step.batch.images))
        return losses.pixel_loss(back, step.batch.images[fake.cells, channels, None], "l1")

    def _judged(self, stains: Tensor) -> Tensor:
        """Of (B, C) stains those of cells that the discriminator can judge: it may want chromatin beside them."""
        return stains & stains[:, self.panel.chromatin_index, None] if self._sees_source else stains

    def _judge(self, stains: Translated, discriminator: PatchDiscriminator) -> Tensor:
        images = stains.images
        if self._sees_source:
            images = torch.cat([stains.batch.images[stains.cells, self.panel.chromatin_index, None], images], 1)
        return discriminator(images, stains.channels)  # type: ignore[no-any-return]

    def _discriminator_loss(self, batch: Batch) -> LossTerms:
        """Real against translated stains of the same markers; the real ones come from any cells of the batch."""
        assert self.discriminator is not None
        fake, kind = self._kept, self.config.adversarial
        if fake is None or fake.batch is not batch:  # no cell could be translated
            return no_terms(self.discriminator.parameters())
        cells = rows_showing(self._judged(batch.measured), fake.channels)
        images = batch.images[cells, fake.channels, None].detach().requires_grad_(bool(self.weights.r1))
        real = self._judge(replace(fake, cells=cells, images=images), self.discriminator)
        guessed = self._judge(fake, self.discriminator)
        return discriminator_terms(real, guessed, kind, r1=self.weights.r1, images=images)

    def signs(self, values: Mapping[str, float]) -> list[str]:
        """Say where a discriminator won, the posterior collapsed, dependence of a stain was hardly ever estimated."""
        said = signs_of_defeat(values, self.config.adversarial, "method.weights.r1")
        said += signs_of_collapse(values, sum(self.network.widths), "lower method.weights.kl")
        if self.discriminator is not None and self.progress > self.config.translation_from:
            said += signs_of_rest(values, "a stain and cells that can be translated to it")
        steps = self._estimated.pop(-1, 0)
        missed = [m for c, m in enumerate(self.panel.markers) if self._estimated[c] < SELDOM * steps]
        self._estimated.clear()
        if missed:
            said.append(
                f"independence was hardly ever estimated of {', '.join(missed)}: fewer than {LEAST_ROWS} cells of a "
                "step (of each process) show it. Raise train.batch_size or method.hidden_proteins"
            )
        return said
