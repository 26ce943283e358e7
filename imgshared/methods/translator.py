"""translator: shared and specific maps of every stain; any subset of a cell's stains predicts any other.

Each stain is encoded to a pyramid of maps, of which a fixed share of the channels is shared and the rest specific. The
shared maps of the visible stains are fused; a decoder draws every stain from the fused maps and its own specific ones,
or from a learnt code where that stain is absent. Hiding stains in training makes it predict what it was not shown;
patch contrast, cycle and adversarial terms let it learn from cells that were never stained together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imgshared import losses
from imgshared.config import TranslatorConfig
from imgshared.data.panel import Panel
from imgshared.methods.base import LatentMethod, ParameterGroup, Stage, sum_terms
from imgshared.methods.draws import Stains, at_most, draw_targets, list_stains, rows_showing, show
from imgshared.models.discriminator import PatchDiscriminator, check_fits
from imgshared.models.patches import PatchProjection, sample_positions
from imgshared.models.pyramid import pool_to_middle
from imgshared.models.translation import Maps, TranslationNetwork
from imgshared.types import Batch, InputError, Latents, LossTerms, Prediction

CYCLE_TERMS, GAME_TERMS = ("patch_nce", "cycle", "identity"), ("adversarial",)
LEAST_ROWS = 8  # of a marker in a batch, below which dependence is not estimated


@dataclass(frozen=True)
class Step:
    """What one step has computed of a batch and several terms share.

    Parameters
    ----------
    batch, stains
        The cells, and the stains of them that were drawn (visible and hidden).
    maps
        Of the encoded stains, `stains` at `encoded`.
    trunk
        (B, width, Y / r0, X / r0), the decoder's shared path from the fused maps of each cell's visible stains.
    """

    batch: Batch
    stains: Stains
    encoded: Tensor
    maps: Maps
    fused: Maps
    trunk: Tensor


@dataclass(frozen=True)
class Translated:
    """Images of stains that the cells did not show, for the adversarial, contrastive and cycle terms."""

    batch: Batch
    cells: Tensor
    channels: Tensor
    images: Tensor


class Translator(LatentMethod):
    """The translator.

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
        For a setting without effect, a discriminator that does not fit the crops, an unknown backbone.
    """

    any_size = True

    def __init__(self, config: TranslatorConfig, *, panel: Panel, crop_px: int) -> None:
        super().__init__()
        self.config, self.weights, self.panel = config, config.weights, panel
        self.network = TranslationNetwork(
            markers=len(panel), chromatin=panel.chromatin_index, channels=config.channels,
            shared_fraction=config.shared_fraction, backbone=config.backbone, by_marker=config.encoders == "marker",
            product=config.fusion == "product", outputs=1 if config.head == "mean" else 2, marker_dim=config.marker_dim,
        )  # fmt: skip
        if crop_px < self.network.multiple:
            raise InputError(
                f"method.channels: {len(config.channels)} levels halve the image to 1/{self.network.multiple}, crops "
                f"are {crop_px} px: name fewer"
            )
        self.discriminator = self.projection = None
        if self.weights.adversarial:
            check_fits(crop_px, config.discriminator_channels)
            inputs = 1 + config.discriminator_sees_source
            self.discriminator = PatchDiscriminator(
                inputs, config.discriminator_channels, markers=len(panel), norm="none"
            )
        if self.weights.patch_nce:
            self.projection = PatchProjection(self.network.widths)
        self.paired = True
        self._kept: Translated | None = None

    @property
    def stages(self) -> Sequence[Stage]:
        """One stage; the discriminator is a second player."""
        c = self.config
        generator = [*self.network.parameters(), *(self.projection.parameters() if self.projection else ())]
        groups = {"generator": [ParameterGroup(generator, c.lr)]}
        if self.discriminator is not None:
            groups["discriminator"] = [
                ParameterGroup(list(self.discriminator.parameters()), c.lr_discriminator, (0.5, 0.999))
            ]
        return [Stage("translator", c.epochs, groups, monitored=self.paired, lr_decay=c.lr_decay)]

    def prepare(self, measured: Tensor, seed: int) -> None:
        """Refuse terms that need cells with two stains where there are none.

        Raises
        ------
        InputError
            Names the term and the configuration that fits.
        """
        super().prepare(measured, seed)
        self.paired = bool((measured.sum(1) > 1).any())
        w = self.weights
        if self.paired:
            return
        for term in ("cross", "agreement"):
            if getattr(w, term):
                raise InputError(
                    f"method.weights.{term} needs cells with two stains, and no training cell has two: set it to 0 and "
                    "learn from unpaired cells by patch_nce, cycle and adversarial, as configs/translator_unpaired.yaml"
                )
        if self.config.discriminator_sees_source:
            raise InputError("method.discriminator_sees_source needs cells with two stains: set it to false")

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Return the weighted terms of the generator, or the discriminator's loss on the same translations."""
        return self._discriminator_loss(batch) if player == "discriminator" else self._generator_loss(batch)

    def _generator_loss(self, batch: Batch) -> LossTerms:
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
        ]
        parts = {name: weight * term(step) for weight, name, term in terms if weight}
        self._kept = None
        if (w.adversarial or w.patch_nce or w.cycle) and self.progress >= self.config.translation_from:
            parts |= self._translation_terms(step)
        return sum_terms(parts)

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
        known = Maps([h[seen] for h in maps.shared], (), [h[seen] for h in maps.log_std]) if all_of_them else maps
        fused = self.network.fuse(known, stains.cells[encoded][seen], len(batch.index))
        return Step(batch, stains, encoded, maps, fused, self.network.shared_path(self._noisy(fused)))

    def _noisy(self, fused: Maps) -> list[Tensor]:
        """Sample the experts, or add the configured noise: in training alone."""
        if fused.log_std:
            return [m + s.exp() * torch.randn_like(m) for m, s in zip(fused.shared, fused.log_std, strict=True)]
        noise = self.config.latent_noise
        return [h + noise * torch.randn_like(h) for h in fused.shared] if noise else list(fused.shared)

    def _error(self, mean: Tensor, log_scale: Tensor | None, target: Tensor) -> Tensor:
        kind = self.config.error if log_scale is None else self.config.head
        return losses.pixel_loss(mean, target, kind, log_scale)  # type: ignore[arg-type]

    def _drawn(self, step: Step, rows: Tensor, detail: Tensor | None = None) -> Tensor:
        """Error of the stains `rows` drawn from their cells' fused maps, with or without their own detail."""
        cells, channels = step.stains.cells[rows], step.stains.channels[rows]
        if not len(rows):
            return step.trunk.sum() * 0.0
        mean, log_scale = self.network.decode(step.trunk[cells], channels, _size(step.batch.images), detail)
        return self._error(mean, log_scale, step.batch.images[cells, channels, None])

    def _full(self, step: Step) -> Tensor:
        seen = step.stains.visible[step.encoded]
        specific = [h[seen] for h in step.maps.specific]
        noise = self.config.latent_noise
        specific = [h + noise * torch.randn_like(h) for h in specific] if noise else specific
        return self._drawn(step, step.encoded[seen], self.network.own_detail(specific))

    def _shared(self, step: Step) -> Tensor:
        return self._drawn(step, step.stains.visible.nonzero()[:, 0])

    def _cross(self, step: Step) -> Tensor:
        return self._drawn(step, (~step.stains.visible).nonzero()[:, 0])

    def _identity(self, step: Step) -> Tensor:
        """L1 of a visible stain that is translated to itself, from its own shared maps alone."""
        rows = step.stains.visible[step.encoded].nonzero()[:, 0]
        maps = Maps([h[rows] for h in step.maps.shared], log_std=[h[rows] for h in step.maps.log_std])
        alone = self.network.fuse(maps, torch.arange(len(rows), device=rows.device), len(rows))
        cells, channels = step.stains.cells[step.encoded[rows]], step.stains.channels[step.encoded[rows]]
        mean, _ = self.network.decode(self.network.shared_path(alone.shared), channels, _size(step.batch.images))
        return losses.pixel_loss(mean, step.batch.images[cells, channels, None], "l1")

    def _agreement(self, step: Step) -> Tensor:
        """Pooled shared latents of two stains of each cell that has two."""
        one, other = step.stains.pairs()
        z = pool_to_middle(step.maps.shared)
        if self.config.agreement == "triplet":
            return losses.triplet(z[one], z[other])
        return losses.info_nce(z[one], z[other])

    def _independence(self, step: Step) -> Tensor:
        """Mean over the markers of the dependence of shared and specific latents over the cells of the batch."""
        measure = losses.hsic if self.config.independence == "hsic" else losses.cross_covariance
        shared, specific = pool_to_middle(step.maps.shared), pool_to_middle(step.maps.specific)
        channels = step.stains.channels[step.encoded]
        found = [(channels == c).nonzero()[:, 0] for c in channels.unique().tolist()]
        each = [measure(shared[rows], specific[rows]) for rows in found if len(rows) >= LEAST_ROWS]
        return torch.stack(each).mean() if each else shared.sum() * 0.0

    def _norm(self, step: Step) -> Tensor:
        return losses.latent_norm(pool_to_middle(step.fused.shared)) + losses.latent_norm(
            pool_to_middle(step.maps.specific)
        )

    def _kl(self, step: Step) -> Tensor:
        levels = zip(step.fused.shared, step.fused.log_std, strict=True)
        return torch.stack([losses.gaussian_kl(m, s) for m, s in levels]).mean()

    def _translation_terms(self, step: Step) -> dict[str, Tensor]:
        """Translate each cell to a stain that it did not show, and judge the image without its real counterpart."""
        w, batch, stains = self.weights, step.batch, step.stains
        shown = stains.mask(len(batch.index), len(self.panel), stains.visible)
        measured = batch.measured
        if self.config.discriminator_sees_source:  # it knows pairs with chromatin alone
            shown = shown & shown[:, self.panel.chromatin_index, None]
            measured = measured & measured[:, self.panel.chromatin_index, None]
        cells, channels = draw_targets(measured, shown)
        if not len(cells):
            return {}
        images, _ = self.network.decode(step.trunk[cells], channels, _size(batch.images))
        fake = Translated(batch, cells, channels, images)
        parts = {}
        if self.discriminator is not None:
            self._kept = Translated(batch, cells, channels, images.detach())
            logits = self._judge(fake, self.discriminator)
            parts["adversarial"] = w.adversarial * losses.adversarial_generator(logits, self.config.adversarial)
        if w.patch_nce or w.cycle:
            again = self.network.encode(images, channels)
            source = stains.first_visible(len(batch.index))[cells]
            if self.projection is not None:
                parts["patch_nce"] = w.patch_nce * self._patch_nce(step, again, source)
            if w.cycle:
                parts["cycle"] = w.cycle * self._cycle(step, again, source, cells)
        return parts

    def _patch_nce(self, step: Step, again: Maps, source: Tensor) -> Tensor:
        """Shared maps of the translation against those of its source, level by level (CUT, eq. 4)."""
        assert self.projection is not None
        place = step.encoded.new_full((len(step.stains.cells),), -1)
        place[step.encoded] = torch.arange(len(step.encoded), device=place.device)
        keys = [h[place[source]].detach() for h in step.maps.shared]
        positions = sample_positions(keys, self.config.patches)
        pairs = zip(self.projection(again.shared, positions), self.projection(keys, positions), strict=True)
        c = self.config
        each = [losses.patch_nce(q, k, temperature=c.temperature, negatives=c.negatives) for q, k in pairs]
        return torch.stack(each).mean()

    def _cycle(self, step: Step, again: Maps, source: Tensor, cells: Tensor) -> Tensor:
        """L1 of the source drawn from its translation alone (Zhu et al. 2017)."""
        fused = self.network.fuse(again, torch.arange(len(cells), device=cells.device), len(cells))
        channels = step.stains.channels[source]
        trunk = self.network.shared_path(self._noisy(fused))
        back, _ = self.network.decode(trunk, channels, _size(step.batch.images))
        return losses.pixel_loss(back, step.batch.images[cells, channels, None], "l1")

    def _judge(self, stains: Translated, discriminator: PatchDiscriminator) -> Tensor:
        images = stains.images
        if self.config.discriminator_sees_source:
            images = torch.cat([stains.batch.images[stains.cells, self.panel.chromatin_index, None], images], 1)
        return discriminator(images, stains.channels)  # type: ignore[no-any-return]

    def _discriminator_loss(self, batch: Batch) -> LossTerms:
        """Real against translated stains of the same markers; the real ones come from any cells of the batch."""
        assert self.discriminator is not None
        fake, kind = self._kept, self.config.adversarial
        if fake is None or fake.batch is not batch:  # no cell could be translated
            zero = next(self.discriminator.parameters()).sum() * 0.0
            return LossTerms(zero, {})
        stained = batch.measured
        if self.config.discriminator_sees_source:
            stained = stained & batch.measured[:, self.panel.chromatin_index, None]
        cells = rows_showing(stained, fake.channels)
        images = batch.images[cells, fake.channels, None].detach().requires_grad_(bool(self.weights.r1))
        real = self._judge(Translated(batch, cells, fake.channels, images), self.discriminator)
        guessed = self._judge(fake, self.discriminator)
        parts = {"adversarial": losses.adversarial_discriminator(real, guessed, kind)}
        if self.weights.r1:
            parts["r1"] = self.weights.r1 * losses.r1_penalty(real, images)
        middle = 0.5 if kind == "lsgan" else 0.0
        right = ((real > middle).float().mean() + (guessed < middle).float().mean()) / 2
        terms = sum_terms(parts)
        return LossTerms(terms.total, {**terms.parts, "accuracy": right.detach()})

    def signs(self, values: Mapping[str, float]) -> list[str]:
        """Say where the discriminator has won."""
        if values.get("discriminator/accuracy", 0.0) < 0.99:
            return []
        return [
            "the discriminator tells every translated stain from a real one: its gradient is spent. Lower "
            "method.lr_discriminator or raise method.weights.r1"
        ]

    # --- use ----------------------------------------------------------------------------------------------------------

    def validate(self, batch: Batch) -> LossTerms:
        """Error of the stains predicted from chromatin alone; of every stain rebuilt where no cell has two."""
        parts = {}
        chromatin = self.panel.chromatin_index
        paired = batch.measured[:, chromatin, None] & batch.measured
        paired[:, chromatin] = False
        cells, channels = paired.nonzero(as_tuple=True)
        if self.paired and len(cells):
            given = torch.zeros_like(batch.measured)
            given[:, chromatin] = batch.measured[:, chromatin]
            trunk, _, _ = self._fused(batch.images, given)
            mean, log_scale = self.network.decode(trunk[cells], channels, _size(batch.images))
            parts["cross"] = self._error(mean, log_scale, batch.images[cells, channels, None])
        else:
            rebuilt = self.reconstruct(batch.images, batch.measured, specific=True)
            parts["full"] = losses.pixel_loss(rebuilt[batch.measured], batch.images[batch.measured], self.config.error)
        return sum_terms(parts)

    def encode(self, images: Tensor, measured: Tensor) -> Latents:
        """Pool the maps about the middle of the crop: the levels' channels, one after the other."""
        _, fused, (cells, channels, maps) = self._fused(images, measured)
        b, c = measured.shape
        shared, specific = pool_to_middle(maps.shared), pool_to_middle(maps.specific)
        each = shared.new_zeros(b, c, shared.shape[1])
        own = specific.new_zeros(b, c, specific.shape[1])
        each[cells, channels], own[cells, channels] = shared, specific
        return Latents(pool_to_middle(fused.shared), each, own, measured)

    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        """Draw each target from the fused shared maps of the measured stains; images of any size."""
        trunk, _, _ = self._fused(images, measured)
        means, scales = [], []
        for target in targets:
            channels = torch.full((len(images),), target, device=images.device)
            mean, log_scale = self.network.decode(trunk, channels, _size(images))
            means.append(mean)
            if log_scale is not None:
                std = 2**0.5 if self.config.head == "laplace" else 1.0  # of a Laplace distribution of scale 1
                scales.append(std * log_scale.exp())
        return Prediction(torch.cat(means, 1), torch.cat(scales, 1) if scales else None)

    def reconstruct(self, images: Tensor, measured: Tensor, *, specific: bool) -> Tensor:
        """Rebuild each measured stain from its own shared maps, and with `specific` its own detail."""
        out = torch.zeros_like(images, dtype=torch.float32)
        cells, channels, maps = self._encoded(images, measured)
        alone = self.network.fuse(maps, torch.arange(len(cells), device=cells.device), len(cells))
        detail = self.network.own_detail(maps.specific) if specific else None
        mean, _ = self.network.decode(self.network.shared_path(alone.shared), channels, _size(images), detail)
        out[cells, channels] = mean[:, 0]
        return out

    def _encoded(self, images: Tensor, measured: Tensor) -> tuple[Tensor, Tensor, Maps]:
        cells, channels = measured.nonzero(as_tuple=True)
        return cells, channels, self.network.encode(images[cells, channels, None], channels)

    def _fused(self, images: Tensor, measured: Tensor) -> tuple[Tensor, Maps, tuple[Tensor, Tensor, Maps]]:
        encoded = self._encoded(images, measured)
        fused = self.network.fuse(encoded[2], encoded[0], len(images))
        return self.network.shared_path(fused.shared), fused, encoded


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
