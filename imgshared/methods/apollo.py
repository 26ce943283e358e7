"""apollo: latent optimisation, then encoders (Zhang, Shivashankar & Uhler, Nat Comput Sci 2026).

Stage 1: every training cell owns free latents z_s and z_m; decoders D_m(z_s, z_m) and shared decoders D'_m(z_s) are
learnt together with them. Stage 2: decoders and latents are frozen and encoders E_m(x_m) regress the latents.
Two modalities: chromatin, and protein, conditioned on a learnt marker embedding, so a cell needs only its own stains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgshared.config import ApolloConfig
from imgshared.losses import gaussian_kl, latent_norm, reconstruction
from imgshared.methods.base import LatentMethod, ParameterGroup, Stage, never_joined, refuse_without_partner, sum_terms
from imgshared.methods.noise import drawn, fixed_noise
from imgshared.models.decoder import LatentDecoder
from imgshared.models.encoder import SplitEncoder
from imgshared.models.latents import LatentTable
from imgshared.types import Batch, Latents, LossTerms, Prediction

LATENTS, ENCODERS, ONE_STEP = "latents", "encoders", "one_step"


class Stains(NamedTuple):
    """Single stains of a batch: stain p is channel ``channels[p]`` of cell ``cells[p]``, all of one modality."""

    modality: str
    cells: Tensor
    channels: Tensor


class Apollo(LatentMethod):
    """apollo and its published ablations.

    Parameters
    ----------
    config
        Sizes, weights and ablations.
    markers, chromatin
        Number of channels of the panel, and which is chromatin.
    crop_px
        Side of the crops.
    """

    def __init__(self, config: ApolloConfig, *, markers: int, chromatin: int, crop_px: int) -> None:
        super().__init__()
        self.config, self.markers, self.chromatin = config, markers, chromatin
        self.scaled = config.draws > 0
        self.split_decoders = config.shared_decoders and config.specific_dim > 0  # without z_m, D is D'
        self.marker = nn.Embedding(markers, config.marker_dim)
        latent_dim = config.shared_dim + config.specific_dim
        encoders, decoders, shared_decoders = {}, {}, {}
        for modality, condition in (("chromatin", 0), ("protein", config.marker_dim)):
            encoders[modality] = SplitEncoder(
                crop_px, config.channels, config.shared_channels, config.shared_dim, config.specific_dim,
                condition_dim=condition, outputs=2 if config.one_step else 1,
            )  # fmt: skip
            decoders[modality] = LatentDecoder(crop_px, config.channels, latent_dim, condition_dim=condition)
            if self.split_decoders:
                shared_decoders[modality] = LatentDecoder(
                    crop_px, config.channels, config.shared_dim, condition_dim=condition
                )
        self.encoders, self.decoders = nn.ModuleDict(encoders), nn.ModuleDict(decoders)
        self.shared_decoders = nn.ModuleDict(shared_decoders)

    @property
    def stages(self) -> Sequence[Stage]:
        """Latents then encoders; or all networks at once."""
        c = self.config
        decoding = [*self.decoders.parameters(), *self.shared_decoders.parameters(), *self.marker.parameters()]
        encoding = list(self.encoders.parameters())
        if c.one_step:
            groups = {"generator": [ParameterGroup([*encoding, *decoding], c.lr_encoder)]}
            return [Stage(ONE_STEP, c.latent_epochs, groups)]
        return [
            Stage(
                LATENTS,
                c.latent_epochs,
                {"generator": [ParameterGroup(decoding, c.lr_decoder)]},
                tables=[(table, c.lr_latent) for table in self.tables.values()],
                validated=False,  # free latents belong to training cells: there is nothing to hold out
                monitored=False,
                augment=False,
            ),
            Stage(ENCODERS, c.encoder_epochs, {"generator": [ParameterGroup(encoding, c.lr_encoder)]}),
        ]

    def prepare(self, measured: Tensor, seed: int) -> None:
        """Give every training cell its latents: one shared row, and one specific row a measured stain.

        Raises
        ------
        InputError
            Where no cell shows chromatin and another stain.
        """
        refuse_without_partner(measured, self.chromatin, self.config.name)
        if self.config.one_step:
            self.tables = {}
            return
        measured = measured.cpu()
        self.slots = (measured.flatten().cumsum(0) - 1).reshape(measured.shape)
        std = self.config.latent_init_std
        self.tables = {"shared": LatentTable(len(measured), self.config.shared_dim, std, seed)}
        if self.config.specific_dim:
            self.tables["specific"] = LatentTable(int(measured.sum()), self.config.specific_dim, std, seed + 1)

    def doubts(self, measured: Tensor, markers: Sequence[str]) -> list[str]:
        """Name the stains that nothing joins with chromatin."""
        return never_joined(measured, self.chromatin, markers)

    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Return the loss of the current stage."""
        stains = self._stains(batch.measured, self.config.proteins_per_step)
        match self.stage.name:
            case "latents":
                parts = self._latent_loss(batch, stains)
            case "encoders":
                parts = self._encoder_loss(batch, stains)
            case _:
                parts = self._one_step_loss(batch, stains)
        return sum_terms(parts)

    def _latent_loss(self, batch: Batch, stains: Sequence[Stains]) -> dict[str, Tensor]:
        """sum_m L(x_m, D_m(z_s + e, z_m + e_m)) + L(x_m, D'_m(z_s + e)) + lambda (|z_s| + sum_m |z_m|)."""
        z_s = self.tables["shared"].draw(batch.index)
        z_m = self._draw_specific(batch, stains)
        noise = self.config.latent_noise
        noisy_s = z_s + noise * torch.randn_like(z_s)
        norms = [latent_norm(z_s), *(latent_norm(z) for z in z_m if z.shape[1])]
        parts = {"norm": self.config.norm_weight * torch.stack(norms).sum()}
        for s, z in zip(stains, z_m, strict=True):
            parts |= self._reconstruction_terms(batch, s, noisy_s[s.cells], z + noise * torch.randn_like(z))
        return parts

    def _draw_specific(self, batch: Batch, stains: Sequence[Stains]) -> list[Tensor]:
        if "specific" not in self.tables:
            return [batch.images.new_zeros(len(s.cells), 0) for s in stains]
        rows = torch.cat([self._slots_of(batch, s) for s in stains])
        drawn = self.tables["specific"].draw(rows)
        return list(drawn.split([len(s.cells) for s in stains]))

    def _slots_of(self, batch: Batch, s: Stains) -> Tensor:
        slots = self.slots[batch.index[s.cells].cpu(), s.channels.cpu()]
        return slots.to(batch.index.device)

    def _reconstruction_terms(self, batch: Batch, s: Stains, z_s: Tensor, z_m: Tensor) -> dict[str, Tensor]:
        target = batch.images[s.cells, s.channels, None]
        condition = self._condition(s)
        kind = self.config.likelihood
        full = self.decoders[s.modality](torch.cat([z_s, z_m], 1), condition)
        terms = {f"{s.modality}/full": reconstruction(full, target, kind)}
        if self.split_decoders:
            shared = self.shared_decoders[s.modality](z_s, condition)
            terms[f"{s.modality}/shared"] = reconstruction(shared, target, kind)
        return terms

    def _encoder_loss(self, batch: Batch, stains: Sequence[Stains]) -> dict[str, Tensor]:
        """sum_m |E_m(x_m) - (z_s, z_m)|^2, mean over latent dimensions."""
        z_s = self.tables["shared"].read(batch.index)
        parts = {}
        for s in stains:
            shared, specific = self.encoders[s.modality](batch.images[s.cells, s.channels, None], self._condition(s))
            parts[f"{s.modality}/z_shared"] = F.mse_loss(shared.float(), z_s[s.cells])
            if "specific" in self.tables:
                z_m = self.tables["specific"].read(self._slots_of(batch, s))
                parts[f"{s.modality}/z_specific"] = F.mse_loss(specific.float(), z_m)
        return parts

    def _one_step_loss(self, batch: Batch, stains: Sequence[Stains]) -> dict[str, Tensor]:
        """Variational autoencoders a stain, whose shared means agree within a cell (the paper's one-step ablation)."""
        n = len(batch.index)
        parts: dict[str, Tensor] = {}
        means, owners, kls = [], [], []
        for s in stains:
            outputs = self.encoders[s.modality](batch.images[s.cells, s.channels, None], self._condition(s))
            (mean_s, log_s), (mean_m, log_m) = (o.float().chunk(2, 1) for o in outputs)
            z_s = mean_s + log_s.exp() * torch.randn_like(mean_s)
            z_m = mean_m + log_m.exp() * torch.randn_like(mean_m)
            parts |= self._reconstruction_terms(batch, s, z_s, z_m)
            kls.append(gaussian_kl(torch.cat([mean_s, mean_m], 1), torch.cat([log_s, log_m], 1)))
            means.append(mean_s)
            owners.append(s.cells)
        mean, owner = torch.cat(means), torch.cat(owners)
        centre = _mean_by_cell(mean, owner, n)[owner]
        parts["match"] = self.config.match_weight * F.mse_loss(mean, centre)
        parts["kl"] = self.config.kl_weight * torch.stack(kls).sum()
        return parts

    def validate(self, batch: Batch) -> LossTerms:
        """Held-out reconstruction of every stain from its own latents, and of proteins from chromatin alone."""
        kind = self.config.likelihood
        parts: dict[str, Tensor] = {}
        of_chromatin = self.encode(batch.images, self._only_chromatin(batch.measured)).shared
        for s in self._stains(batch.measured, None):
            target = batch.images[s.cells, s.channels, None]
            z_s, z_m = self._encode_stains(batch.images, s)
            full = self._decode(s, z_s, z_m)
            parts[f"{s.modality}/full"] = reconstruction(full, target, kind)
            known = batch.measured[s.cells, self.chromatin]
            if s.modality == "protein" and known.any():
                s = s._replace(cells=s.cells[known], channels=s.channels[known])
                predicted = self._decode(s, of_chromatin[s.cells], None)
                parts["protein/predicted"] = reconstruction(predicted, target[known], kind)
        return sum_terms(parts) if parts else LossTerms(batch.images.new_zeros(()), {}, count=0)

    def encode(self, images: Tensor, measured: Tensor) -> Latents:
        """Encode each measured stain; the fused shared latent is the mean of what the stains say."""
        b, c = measured.shape
        each = images.new_zeros(b, c, self.config.shared_dim, dtype=torch.float32)
        specific = images.new_zeros(b, c, self.config.specific_dim, dtype=torch.float32)
        for s in self._stains(measured, None):
            z_s, z_m = self._encode_stains(images, s)
            each[s.cells, s.channels], specific[s.cells, s.channels] = z_s, z_m
        fused = each.sum(1) / measured.sum(1, keepdim=True).clamp_min(1)
        return Latents(fused, each, specific, measured)

    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        """Predict stains by the shared decoders D'(z_s, marker); without them, by D(z_s, 0, marker).

        With `draws` the scale is what the noise of stage 1, which the decoders have learnt to bear, does to a pixel.
        """
        z_s = self.encode(images, measured).shared
        cells = torch.arange(len(images), device=images.device)

        def draw(target: int, latent: Tensor) -> Tensor:
            modality = "chromatin" if target == self.chromatin else "protein"
            s = Stains(modality, cells, torch.full_like(cells, target))
            return torch.sigmoid(self._decode(s, latent, None).float())

        noisy = [z_s + self.config.latent_noise * e for e in fixed_noise(self.config.draws, z_s)]
        return drawn([(draw(t, z_s), (draw(t, z) for z in noisy)) for t in targets])

    def reconstruct(self, images: Tensor, measured: Tensor, *, specific: bool) -> Tensor:
        """Rebuild each measured stain from its own z_s, and with `specific` its z_m; zero where not measured."""
        out = torch.zeros_like(images, dtype=torch.float32)
        for s in self._stains(measured, None):
            z_s, z_m = self._encode_stains(images, s)
            logits = self._decode(s, z_s, z_m if specific else None)
            out[s.cells, s.channels] = torch.sigmoid(logits.float())[:, 0]
        return out

    def _stains(self, measured: Tensor, proteins_per_cell: int | None) -> list[Stains]:
        """List the measured stains by modality; of the proteins at most so many a cell, drawn at random."""
        is_chromatin = torch.zeros(self.markers, dtype=torch.bool, device=measured.device)
        is_chromatin[self.chromatin] = True
        proteins = measured & ~is_chromatin
        if proteins_per_cell is not None:
            rank = (
                (torch.rand(proteins.shape, device=proteins.device) + proteins).argsort(1, descending=True).argsort(1)
            )
            proteins = proteins & (rank < proteins_per_cell)
        found = [("chromatin", measured & is_chromatin), ("protein", proteins)]
        return [Stains(name, *pairs) for name, mask in found if len((pairs := mask.nonzero(as_tuple=True))[0])]

    def _only_chromatin(self, measured: Tensor) -> Tensor:
        only = torch.zeros_like(measured)
        only[:, self.chromatin] = measured[:, self.chromatin]
        return only

    def _condition(self, s: Stains) -> Tensor | None:
        return self.marker(s.channels) if s.modality == "protein" else None

    def _encode_stains(self, images: Tensor, s: Stains) -> tuple[Tensor, Tensor]:
        z_s, z_m = self.encoders[s.modality](images[s.cells, s.channels, None], self._condition(s))
        if self.config.one_step:
            z_s, z_m = z_s.chunk(2, 1)[0], z_m.chunk(2, 1)[0]
        return z_s.float(), z_m.float()

    def _decode(self, s: Stains, z_s: Tensor, z_m: Tensor | None) -> Tensor:
        """D(z_s, z_m), or without z_m D'(z_s); where there is no D', D with z_m = 0, the centre of its penalty."""
        condition = self._condition(s)
        if z_m is None and self.split_decoders:
            return self.shared_decoders[s.modality](z_s, condition)  # type: ignore[no-any-return]
        if z_m is None:
            z_m = z_s.new_zeros(len(z_s), self.config.specific_dim)
        return self.decoders[s.modality](torch.cat([z_s, z_m], 1), condition)  # type: ignore[no-any-return]


def _mean_by_cell(rows: Tensor, owner: Tensor, cells: int) -> Tensor:
    """Average the (P, D) rows that each of the cells owns, to (cells, D)."""
    summed = rows.new_zeros(cells, rows.shape[1]).index_add(0, owner, rows)
    count = rows.new_zeros(cells).index_add(0, owner, torch.ones_like(owner, dtype=rows.dtype))
    return summed / count.clamp_min(1)[:, None]
