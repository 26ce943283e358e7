"""Fuse what several stains of a cell say of one thing."""

from __future__ import annotations

import torch
from torch import Tensor


def fuse_mean(maps: Tensor, cells: Tensor, n: int) -> Tensor:
    """Mean of the (P, ...) maps of each cell: (n, ...) of their type; zero for a cell without any.

    Half precision is summed in float32.
    """
    if len(cells) == n and bool((cells == torch.arange(n, device=cells.device)).all()):
        return maps  # one each, in order
    wide = maps.float()
    count = wide.new_zeros(n).index_add(0, cells, wide.new_ones(len(cells))).clamp_min(1)
    summed = wide.new_zeros(n, *maps.shape[1:]).index_add(0, cells, wide)
    return (summed / count.reshape(n, *[1] * (maps.ndim - 1))).to(maps.dtype)


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
