"""Losses: pure functions of tensors, scalars out."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction(logits: Tensor, target: Tensor, likelihood: Literal["bce", "mse"]) -> Tensor:
    """Mean over pixels of the negative log-likelihood of an image.

    "bce": binary cross-entropy with logits against `target` clamped to [0, 1], where it is a likelihood at all;
    "mse": squared error of ``sigmoid(logits)``. Shapes are equal; both in float32 whatever the autocast.
    """
    logits, target = logits.float(), target.float()
    if likelihood == "bce":
        return F.binary_cross_entropy_with_logits(logits, target.clamp(0, 1))
    return F.mse_loss(torch.sigmoid(logits), target)


def latent_norm(latent: Tensor) -> Tensor:
    """Mean over rows of the Euclidean norm of (B, D) latents, divided by D (apollo's activation decay)."""
    norms = latent.square().sum(1).clamp_min(1e-12).sqrt()  # the norm has no gradient at zero
    return norms.mean() / max(latent.shape[1], 1)


def gaussian_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """Mean over (B, D) of KL(N(mean, std^2) || N(0, 1)) (Kingma & Welling 2014, appendix B)."""
    return kl_per_dimension(mean, log_std).mean()


def kl_per_dimension(mean: Tensor, log_std: Tensor) -> Tensor:
    """(D,) mean over the rows of (B, D) of KL(N(mean, std^2) || N(0, 1)); a dimension near 0 carries nothing."""
    mean, log_std = _wide(mean), _wide(log_std)
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).mean(0)


def pixel_loss(
    mean: Tensor,
    target: Tensor,
    kind: Literal["l1", "l2", "laplace", "gaussian"],
    log_scale: Tensor | None = None,
) -> Tensor:
    """Mean over all elements of the error of an image, or of its negative log-likelihood in nats.

    "l1": |x - m|; "l2": (x - m)^2; "laplace": |x - m| / b + log(2 b); "gaussian": ((x - m) / s)^2 / 2 + log s +
    log(2 pi) / 2. `log_scale`, the log of b or of s, is broadcast to the image and not bounded here; 0 where not given.
    The cycle consistency and identity terms of CycleGAN (Zhu et al. 2017, eq. 2 and section 5.2) are "l1".
    """
    error = _wide(target) - _wide(mean)
    if kind == "l1":
        return error.abs().mean()
    if kind == "l2":
        return error.square().mean()
    log_scale = error.new_zeros(()) if log_scale is None else _wide(log_scale)
    if kind == "laplace":
        return (error.abs() * (-log_scale).exp() + log_scale + math.log(2)).mean()
    return (0.5 * (error * (-log_scale).exp()).square() + log_scale + 0.5 * math.log(2 * math.pi)).mean()


def patch_nce(
    query: Tensor, key: Tensor, *, temperature: float = 0.07, negatives: Literal["image", "batch"] = "image"
) -> Tensor:
    """Mean over queries of the InfoNCE loss of patches (CUT, Park et al. 2020, eq. 3-4).

    Parameters
    ----------
    query, key
        (B, S, D) features of the translated and of the source image at the same S positions, L2-normalised here. The
        key is detached: the translation moves towards the source.
    negatives
        Key s is the positive of query s; its negatives are the other positions of the same image, or of the batch.
    """
    query, key = _wide(query), _wide(key.detach())
    if negatives == "batch":
        query, key = query.flatten(0, 1)[None], key.flatten(0, 1)[None]
    logits = (_cosines(query, key) / temperature).flatten(0, 1)
    own = torch.arange(key.shape[1], device=key.device).repeat(len(key))
    return F.cross_entropy(logits, own)


def info_nce(a: Tensor, b: Tensor, *, temperature: float = 0.1) -> Tensor:
    """InfoNCE of (B, D) rows that pair off, mean of both directions (CLIP, Radford et al. 2021); 0 for one row.

    Rows are L2-normalised; the other rows of the other tensor are the negatives.
    """
    a, b = _wide(a), _wide(b)
    if len(a) < 2:
        return _zero(a, b)
    logits = _cosines(a, b) / temperature
    own = torch.arange(len(a), device=a.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own))


def triplet(a: Tensor, b: Tensor, *, margin: float = 0.2) -> Tensor:
    """Mean over rows of the batch-hard triplet loss of (B, D) rows that pair off (Hermans et al. 2017); 0 for one row.

    max(0, margin + |a_i - b_i| - min_{j != i} |a_i - b_j|), Euclidean distances of L2-normalised rows, in [0, 2].
    """
    a, b = _wide(a), _wide(b)
    if len(a) < 2:
        return _zero(a, b)
    distances = _distances(_unit(a), _unit(b))
    others = distances.masked_fill(torch.eye(len(a), dtype=torch.bool, device=a.device), math.inf)
    return F.relu(margin + distances.diagonal() - others.amin(1)).mean()


def adversarial_generator(fake: Tensor, kind: Literal["lsgan", "hinge", "bce"]) -> Tensor:
    """Mean over the logits of generated images, of any shape, of what the generator lowers.

    "lsgan": (D - 1)^2 (Mao et al. 2017); "hinge": -D (Lim & Ye 2017); "bce": -log sigmoid(D), the non-saturating form
    (Goodfellow et al. 2014).
    """
    fake = _wide(fake)
    if kind == "lsgan":
        return (fake - 1).square().mean()
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adversarial_discriminator(real: Tensor, fake: Tensor, kind: Literal["lsgan", "hinge", "bce"]) -> Tensor:
    """Mean over the logits of real images plus that over generated ones of what the discriminator lowers.

    "lsgan": (D - 1)^2 and D^2; "bce": -log sigmoid(D) and -log sigmoid(-D), both sums halved as in the code of pix2pix
    and CycleGAN, where that slows the discriminator; "hinge": max(0, 1 - D) and max(0, 1 + D), not halved. The caller
    detaches the generated images.
    """
    real, fake = _wide(real), _wide(fake)
    if kind == "lsgan":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Half the mean over images of |d(sum of its logits) / d(image)|^2 (Mescheder et al. 2018, eq. 9), differentiable.

    `images` (B, ...) require a gradient and gave `logits`, without BatchNorm, which would mix the images.
    """
    (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return 0.5 * _wide(slope).flatten(1).square().sum(1).mean()


def hsic(a: Tensor, b: Tensor) -> Tensor:
    """Biased HSIC tr(KHLH) / (B - 1)^2 of (B, D1) and (B, D2) rows, in [0, 1) (Gretton et al. 2005, definition 2).

    Gaussian kernels exp(-d^2 / 2 s^2) of bandwidth s the median distance: the latents' scale does not matter, nor does
    the gradient change it, as it would first of all if the bandwidth were held fixed. 0 for fewer than two rows, or
    where a side has no columns.
    """
    a, b = _wide(a), _wide(b)
    if len(a) < 2 or not a.shape[1] or not b.shape[1]:
        return _zero(a, b)
    of_a, of_b = (torch.exp(-0.5 * (_distances(x, x) / _bandwidth(x)).square()) for x in (a, b))  # K and L
    centred = of_a - of_a.mean(0) - of_a.mean(1, keepdim=True) + of_a.mean()  # HKH; tr(HKHL) sums its products with L
    return (centred * of_b).sum() / (len(a) - 1) ** 2


def cross_covariance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over pairs of a column of (B, D1) and one of (B, D2) of their squared correlation, in [0, 1].

    Correlation, since a covariance falls with the latents' scale, whatever they share (after XCov, Cheung et al. 2015).
    A constant column counts 0; so does a side without columns.
    """
    a, b = _wide(a), _wide(b)
    if not a.numel() or not b.numel():
        return _zero(a, b)
    # the first row goes first, so that rounding leaves a constant column exactly 0
    a, b = (x - x[:1].detach() for x in (a, b))
    a, b = (x - x.mean(0) for x in (a, b))
    return _cosines(a.mT, b.mT).square().mean()


def _wide(x: Tensor) -> Tensor:
    """Lift half types to float32; float64 stays, for gradcheck."""
    return x if x.dtype == torch.float64 else x.float()


def _zero(a: Tensor, b: Tensor) -> Tensor:
    """0 on the graph of both, so that a loss without terms still has a backward pass."""
    return 0 * (a.sum() + b.sum())


def _unit(rows: Tensor) -> Tensor:
    """L2-normalise the last axis. A zero row (background) has no direction: it stays 0 and gets no gradient."""
    squares = rows.square().sum(-1, keepdim=True)
    return torch.where(squares > 1e-12, rows * squares.clamp_min(1e-12).rsqrt(), 0)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """(..., M, N) cosines of (..., M, D) and (..., N, D) rows, outside the autocast, which would round them."""
    with torch.autocast(a.device.type, enabled=False):
        return _unit(a) @ _unit(b).mT


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) Euclidean distances of rows, exact for near ones too; a zero distance has a zero gradient."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _bandwidth(rows: Tensor) -> Tensor:
    """The (lower) median distance of two rows; 1 where most rows coincide."""
    median = torch.pdist(rows).median()
    return torch.where(median > 0, median, 1)
