"""Features of patches, for the contrastive loss between an image and its translation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchProjection(nn.Module):
    """Feature maps at some positions to unit vectors, by a two-layer MLP a level (CUT, Park et al. 2020).

    Parameters
    ----------
    widths
        Channels of each level's feature map.
    dim
        Length of the vectors.
    """

    def __init__(self, widths: Sequence[int], dim: int = 256) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Linear(width, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim)) for width in widths
        )
        self.levels.apply(_start)

    def forward(self, features: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Tensor]:
        """Project (B, C, Y, X) maps at (S,) positions, level by level, to (B, S, dim) float32 of length 1."""
        vectors = []
        for level, h, at in zip(self.levels, features, positions, strict=True):
            rows = h.flatten(2).index_select(2, at).mT
            vectors.append(F.normalize(level(rows).float(), dim=-1))
        return vectors


def sample_positions(features: Sequence[Tensor], n: int) -> list[Tensor]:
    """Draw, for each (B, C, Y, X) map, min(n, Y * X) distinct positions, row by row, that all its images share.

    As in the published code. Take them from one image and use them for both: patches correspond by position. Draws from
    torch's global generator on the CPU, on any device.
    """
    return [torch.randperm(h.shape[2] * h.shape[3])[:n].to(h.device) for h in features]


def _start(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, 0.0, 0.02)
        nn.init.zeros_(layer.bias)
