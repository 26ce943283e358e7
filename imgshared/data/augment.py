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
        ``(raw (B, C, Y, X), seed) -> same shape``.
    change
        ``(images (B * C, 1, Y, X)) -> same shape``, on the device; draws from torch's global generator.
    on_host
        Whether the geometry works in host memory alone; mirror images and right angles are done where the crops are.
    """

    geometry: Callable[[Tensor, int], Tensor] | None = None
    change: Callable[[Tensor], Tensor] | None = None
    on_host: bool = False

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
    """Return paired geometry for raw crops of any channel count and dtype, or None where all is off.

    Flips alone are torch's and work on any device; with anything else albumentations does all, on the host.
    """
    if not (flips or rotate_deg or scale or shift):
        return None
    if not (rotate_deg or scale or shift):
        return mirror_and_turn
    import albumentations as albu  # slow to import, and only needed here

    steps: list[Any] = [albu.D4(p=1.0)] if flips else []
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


def mirror_and_turn(raw: Tensor, seed: int) -> Tensor:
    """Give each square crop of a (B, C, Y, X) batch one of its 8 mirror images and quarter turns, drawn at random."""
    if raw.dtype == torch.uint16:  # few kernels know it; moving pixels does not ask what they mean
        return mirror_and_turn(raw.view(torch.int16), seed).view(torch.uint16)
    drawn = torch.randint(8, (len(raw),), generator=torch.Generator().manual_seed(seed)).to(raw.device)
    out = raw.clone()
    for which in range(1, 8):
        rows = (drawn == which).nonzero()[:, 0]
        if len(rows):
            turned = raw[rows].rot90(which % 4, (2, 3))
            out[rows] = turned.flip(3) if which >= 4 else turned
    return out


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
