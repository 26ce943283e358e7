"""Fuse what several stains of a cell say of one thing."""

from __future__ import annotations

import torch
from torch import Tensor


def fuse_mean(maps: Tensor, weights: Tensor, cells: Tensor, n: int) -> Tensor:
    """Weighted mean of the maps of each cell.

    Parameters
    ----------
    maps
        (P, C, ...) of each stain.
    weights
        (P, C), above zero: what a stain's channel counts.
    cells
        (P,) int64, whose stain each is.
    n
        Number of cells.

    Returns
    -------
    (n, C, ...) of the maps' type, half precision summed in float32; zero for a cell without any stain.
    """
    if len(cells) == n and bool((cells == torch.arange(n, device=cells.device)).all()):
        return maps  # one each, in order
    weights = weights.float()
    share = weights / weights.new_zeros(n, weights.shape[1]).index_add(0, cells, weights)[cells]
    weighted = maps.float() * share.reshape(*share.shape, *[1] * (maps.ndim - 2))
    return weighted.new_zeros(n, *maps.shape[1:]).index_add(0, cells, weighted).to(maps.dtype)


def fuse_product(mean: Tensor, log_std: Tensor, cells: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Product of the Gaussian experts of each cell and a standard normal prior (Wu & Goodman 2018, eq. 4).

    Parameters
    ----------
    mean, log_std
        (P, ...) of each expert.
    cells
        (P,) int64, whose expert each is.
    n
        Number of cells.

    Returns
    -------
    Mean and log standard deviation, (n, ...) float32; those of the prior, 0 and 0, for a cell without any expert.
    """
    mean, precision = mean.float(), (-2 * log_std.float()).exp()
    weight = mean.new_ones(n, *mean.shape[1:]).index_add(0, cells, precision)  # 1: the prior's
    total = mean.new_zeros(n, *mean.shape[1:]).index_add(0, cells, mean * precision)
    return total / weight, -0.5 * weight.log()


def product_of(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """`fuse_product` of experts that are stacked along the first axis, (S, n, ...), every cell having all of them."""
    precision = (-2 * log_std.float()).exp()
    weight = 1 + precision.sum(0)
    return (mean.float() * precision).sum(0) / weight, -0.5 * weight.log()
