"""Losses: pure functions of tensors, scalars out."""

from __future__ import annotations

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
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).mean()
