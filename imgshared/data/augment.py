"""Training-time augmentation: one geometry for all channels of a cell, one intensity change a channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgshared.types import Batch


@dataclass(frozen=True)
class Augment:
    """Both halves; either may be None.

    Parameters
    ----------
    geometry
        ``(raw (B, C, Y, X), seed) -> same shape``, on the host.
    change
        ``(images (B * C, 1, Y, X)) -> same shape``, on the device; draws from torch's global generator.
    """

    geometry: Callable[[Tensor, int], Tensor] | None = None
    change: Callable[[Tensor], Tensor] | None = None

    def intensity(self, batch: Batch, seed: int) -> Batch:
        """Change each measured channel of each cell on its own."""
        if self.change is None:
            return batch
        b, c, y, x = batch.images.shape
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            changed = self.change(batch.images.reshape(b * c, 1, y, x)).reshape(b, c, y, x)
        images = torch.where(batch.measured[..., None, None], changed, batch.images)
        return replace(batch, images=images.contiguous(memory_format=torch.channels_last))


def paired_geometry(
    *, flips: bool, rotate_deg: float, scale: float, shift: float
) -> Callable[[Tensor, int], Tensor] | None:
    """Return albumentations' paired geometry for raw crops of any channel count and dtype, or None where all is off."""
    if not (flips or rotate_deg or scale or shift):
        return None
    import albumentations as albu  # slow to import, and only needed here

    steps: list[Any] = [albu.D4(p=1.0)] if flips else []
    if rotate_deg or scale or shift:
        steps.append(
            albu.Affine(
                rotate=(-rotate_deg, rotate_deg),
                scale=(1 - scale, 1 + scale),
                translate_percent=(-shift, shift),
                border_mode=1,  # replicate the edge: zero would be darker than the camera's offset
                p=1.0,
            )
        )
    compose = albu.Compose(steps)

    def apply(raw: Tensor, seed: int) -> Tensor:
        compose.set_random_seed(seed % 2**32)
        crops = raw.numpy().transpose(0, 2, 3, 1)
        warped = np.stack([compose(image=np.ascontiguousarray(crop))["image"] for crop in crops])
        return torch.from_numpy(np.ascontiguousarray(warped.transpose(0, 3, 1, 2)))

    return apply


def channel_intensity(*, gain: float, noise: float) -> Callable[[Tensor], Tensor] | None:
    """Return kornia's per-image gain and Gaussian noise, without clipping, or None where both are off."""
    if not (gain or noise):
        return None
    import kornia.augmentation as ka  # slow to import, and only needed here

    steps: list[Any] = []
    if gain:
        steps.append(ka.RandomContrast((1 - gain, 1 + gain), clip_output=False, p=1.0))  # kornia: image * factor
    if noise:
        steps.append(ka.RandomGaussianNoise(mean=0.0, std=noise, p=1.0))
    return torch.nn.Sequential(*steps)
