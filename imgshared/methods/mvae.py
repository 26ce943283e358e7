"""mvae: a multimodal variational autoencoder whose posterior is a product of experts (Wu & Goodman 2018).

Every stain's encoder gives a Gaussian over the one latent of the cell; the posterior of any set of stains is the
product of their Gaussians and the prior. Two modalities: chromatin, and protein, conditioned on a learnt marker
embedding, so a cell needs only its own stains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgshared.config import MvaeConfig
from imgshared.data.panel import Panel
from imgshared.losses import kl_per_dimension, reconstruction
from imgshared.methods.base import LatentMethod, ParameterGroup, Stage, never_joined, refuse_without_partner, sum_terms
from imgshared.methods.draws import at_most
from imgshared.methods.noise import drawn, fixed_noise
from imgshared.methods.posterior import signs_of_collapse, spread_of_kl
from imgshared.models.bounds import soft_bound
from imgshared.models.decoder import LatentDecoder
from imgshared.models.encoder import SplitEncoder
from imgshared.models.fusion import fuse_product
from imgshared.types import Batch, Latents, LossTerms, Prediction

LOG_STD = 6.0  # an expert's log standard deviation is kept within +- this, where its precision is finite


class Experts(NamedTuple):
    """What each stain says of the latent: Gaussians, (B, C, D) float32 each; zero where nothing is said."""

    mean: Tensor
    log_std: Tensor


class Mvae(LatentMethod):
    """One latent a cell, that any of its stains tell and all of them are decoded from; nothing is specific.

    Parameters
    ----------
    config
        Sizes, weights and optimisation.
    panel
        The model's.
    crop_px
        Side of the crops.

    Raises
    ------
    InputError
        Where the crops cannot be halved once for each of the channels.
    """

    def __init__(self, config: MvaeConfig, *, panel: Panel, crop_px: int) -> None:
        super().__init__()
        self.config, self.chromatin, self.pixels = config, panel.chromatin_index, crop_px**2
        self.scaled = config.draws > 0
        self.marker = nn.Embedding(len(panel), config.marker_dim)
        encoders, decoders = {}, {}
        for modality, condition in (("chromatin", 0), ("protein", config.marker_dim)):
            encoders[modality] = SplitEncoder(
                crop_px, config.channels, config.channels[-1], config.latent_dim, 0, condition_dim=condition, outputs=2
            )
            decoders[modality] = LatentDecoder(crop_px, config.channels, config.latent_dim, condition_dim=condition)
        self.encoders, self.decoders = nn.ModuleDict(encoders), nn.ModuleDict(decoders)

    @property
    def stages(self) -> Sequence[Stage]:
        """One."""
        c = self.config
        groups = {"generator": [ParameterGroup(list(self.parameters()), c.lr)]}
        return [Stage("autoencoder", c.epochs, groups, lr_decay=c.lr_decay)]

    @property
    def beta(self) -> float:
        """Weight of the KL at this point of the stage, rising linearly (Wu & Goodman 2018, section 4)."""
        c = self.config
        return c.beta * min(1.0, self.progress / c.anneal) if c.anneal else c.beta

    def prepare(self, measured: Tensor, seed: int) -> None:
        """Refuse cells of which none shows chromatin and another stain."""
        super().prepare(measured, seed)
        refuse_without_partner(measured, self.chromatin, self.config.name)

    def doubts(self, measured: Tensor, markers: Sequence[str]) -> list[str]:
        """Name the stains that nothing joins with chromatin."""
        return never_joined(measured, self.chromatin, markers)

    def loss(self, batch: Batch, player: str) -> LossTerms:
        """Negative ELBO of all stains of a cell, of each alone and of random subsets (eq. 5), mean over the cells.

        The ELBO of a subset X is that of eq. 2: sum over the stains in X, and no other, of log p(x | z), minus
        beta KL(q(z | X) || p(z)), with z drawn from q(z | X). Here it is divided by the pixels of a crop: a stain's
        likelihood is a mean over pixels and the KL, summed over the latent dimensions, is divided by their number, so
        that beta = 1 is the true bound. The likelihood "bce" is Bernoulli, "mse" Gaussian of variance 1/2.

        What is watched is no term of the loss: the KL of each latent dimension (`spread_of_kl`), averaged over the
        batch, given all stains, chromatin alone (`chromatin/...`) and one protein alone (`protein/...`).
        """
        proteins = batch.measured.clone()
        proteins[:, self.chromatin] = False
        shown = at_most(proteins, self.config.proteins_per_step)
        shown[:, self.chromatin] = batch.measured[:, self.chromatin]
        subsets = [random_subsets(shown) for _ in range(self.config.subsets)]
        return self._negative_elbo(batch, shown, subsets, self.beta)

    def validate(self, batch: Batch) -> LossTerms:
        """Negative ELBO of all stains of a cell and of each alone, with the full beta; z is drawn, as in training."""
        terms = self._negative_elbo(batch, batch.measured, [], self.config.beta)
        return replace(terms, count=None if batch.measured.any() else 0)

    def _negative_elbo(
        self, batch: Batch, shown: Tensor, subsets: Sequence[tuple[Tensor, Tensor]], beta: float
    ) -> LossTerms:
        """Return the terms of `loss` for the stains `shown` (B, C) and for some (cells, masks) of subsets of them."""
        n = len(shown)
        cells, channels = shown.nonzero(as_tuple=True)
        everything = (torch.arange(n, device=shown.device), shown)
        alone = (cells, F.one_hot(channels, shown.shape[1]).bool())
        owner, masks = (torch.cat(part) for part in zip(everything, alone, *subsets, strict=True))

        experts = self._encode_stains(batch.images, shown)
        mean, log_std = _posteriors(experts, owner, masks)
        z = mean + log_std.exp() * torch.randn_like(mean)
        parts = {}
        for modality, rows, channels in self._by_modality(masks):
            target = batch.images[owner[rows], channels, None]
            logits = self._decode(modality, z[rows], channels)
            share = len(rows) / n  # from the mean over these stains to their sum in a cell
            parts[modality] = share * reconstruction(logits, target, self.config.likelihood)
        kl = kl_per_dimension(mean, log_std).sum() * len(mean) / n
        terms = sum_terms({**parts, "kl": beta * kl / self.pixels})
        watched = spread_of_kl([(mean[:n], log_std[:n])])
        one = slice(n, n + len(cells))
        for modality, rows, _ in self._by_modality(masks[one]):
            found = spread_of_kl([(mean[one][rows], log_std[one][rows])])
            watched |= {f"{modality}/{name}": value for name, value in found.items()}
        return LossTerms(terms.total, {**terms.parts, **watched})

    def encode(self, images: Tensor, measured: Tensor) -> Latents:
        """Return posterior means: of all marked stains together, and of each alone; nothing is specific."""
        experts = self._encode_stains(images, measured)
        shared, _ = _posteriors(experts, torch.arange(len(measured), device=measured.device), measured)
        cells, channels = measured.nonzero(as_tuple=True)
        each = torch.zeros_like(experts.mean)
        each[cells, channels], _ = _posteriors(experts, cells, F.one_hot(channels, measured.shape[1]).bool())
        return Latents(shared, each, shared.new_zeros(*measured.shape, 0), measured)

    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        """Decode the mean of the posterior given the marked stains; with `draws` the scale is its spread."""
        experts = self._encode_stains(images, measured)
        z, log_std = _posteriors(experts, torch.arange(len(measured), device=measured.device), measured)

        def draw(target: int, latent: Tensor) -> Tensor:
            channels = torch.full((len(z),), target, device=z.device)
            modality = "chromatin" if target == self.chromatin else "protein"
            return torch.sigmoid(self._decode(modality, latent, channels).float())

        noisy = [z + log_std.exp() * e for e in fixed_noise(self.config.draws, z)]
        return drawn([(draw(t, z), (draw(t, latent) for latent in noisy)) for t in targets])

    def reconstruct(self, images: Tensor, measured: Tensor, *, specific: bool) -> Tensor:
        """Rebuild each measured stain from its own posterior mean; there is no specific part to leave out."""
        each = self.encode(images, measured).each
        out = torch.zeros_like(images, dtype=torch.float32)
        for modality, cells, channels in self._by_modality(measured):
            logits = self._decode(modality, each[cells, channels], channels)
            out[cells, channels] = torch.sigmoid(logits.float())[:, 0]
        return out

    def signs(self, values: Mapping[str, float]) -> list[str]:
        """Say where hardly any latent dimension carries information: of all stains, or of one, as predictions start."""
        n, remedy = self.config.latent_dim, "lower method.beta or raise method.anneal"
        return [s for given in ("", "chromatin", "protein") for s in signs_of_collapse(values, n, remedy, given)]

    def _by_modality(self, marked: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (modality, rows, channels) of the stains marked in (R, C) bool."""
        rows, channels = marked.nonzero(as_tuple=True)
        is_chromatin = channels == self.chromatin
        for modality, chosen in (("chromatin", is_chromatin), ("protein", ~is_chromatin)):
            if chosen.any():
                yield modality, rows[chosen], channels[chosen]

    def _encode_stains(self, images: Tensor, shown: Tensor) -> Experts:
        shape = (*shown.shape, self.config.latent_dim)
        mean, log_std = (images.new_zeros(shape, dtype=torch.float32) for _ in range(2))
        for modality, cells, channels in self._by_modality(shown):
            condition = self._condition(modality, channels)
            said, _ = self.encoders[modality](images[cells, channels, None], condition)
            mean[cells, channels], spread = said.float().chunk(2, 1)
            log_std[cells, channels] = soft_bound(spread, -LOG_STD, LOG_STD)
        return Experts(mean, log_std)

    def _decode(self, modality: str, z: Tensor, channels: Tensor) -> Tensor:
        return self.decoders[modality](z, self._condition(modality, channels))  # type: ignore[no-any-return]

    def _condition(self, modality: str, channels: Tensor) -> Tensor | None:
        return self.marker(channels) if modality == "protein" else None


def _posteriors(experts: Experts, owner: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """(R, D) means and log standard deviations of the latents of cells `owner` (R,) given what (R, C) masks mark."""
    rows, channels = masks.nonzero(as_tuple=True)
    cells = owner[rows]
    return fuse_product(experts.mean[cells, channels], experts.log_std[cells, channels], rows, len(masks))


def random_subsets(shown: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a subset of each cell's stains, of two or more but not all (as the published code of Wu & Goodman).

    Returns
    -------
    The cells of (B, C) `shown` that have three stains, for no other has such a subset, and masks (cells, C). Every
    size is as likely as any other.
    """
    cells = (shown.sum(1) > 2).nonzero()[:, 0]
    shown = shown[cells]
    size = 2 + (torch.rand(len(cells), device=shown.device) * (shown.sum(1) - 2)).long()
    rank = torch.rand(shown.shape, device=shown.device).masked_fill(~shown, -1).argsort(1, descending=True).argsort(1)
    return cells, rank < size[:, None]
