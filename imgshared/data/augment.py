"""Training-time augmentation: one geometry for all channels of a cell, one intensity change a channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgshared.types import Batch

Geometry = Callable[[Tensor, int], Tensor]  # raw crops (B, C, Y, X) and a seed to the same shape


@dataclass(frozen=True)
class Augment:
    """Both halves; either may be None.

    Parameters
    ----------
    geometry
        ``(raw (B, C, Y, X), seed) -> same shape``, wherever the crops are.
    change
        ``(images (B * C, 1, Y, X)) -> same shape``, on the device; draws from torch's global generator.
    """

    geometry: Geometry | None = None
    change: Callable[[Tensor], Tensor] | None = None

    def intensity(self, batch: Batch, seed: int) -> Batch:
        """Change each measured channel of each cell on its own."""
        if self.change is None:
            return batch
        b, c, y, x = batch.images.shape
        with torch.random.fork_rng(_drawing(batch.images)):
            torch.manual_seed(seed)
            changed = self.change(batch.images.reshape(b * c, 1, y, x)).reshape(b, c, y, x)
        images = torch.where(batch.measured[..., None, None], changed, batch.images)
        return replace(batch, images=images.contiguous(memory_format=torch.channels_last))


def paired_geometry(*, flips: bool, rotate_deg: float, scale: float, shift: float) -> Geometry | None:
    """Return paired geometry for raw crops of any channel count and dtype, or None where all is off.

    Crops in host memory are warped by albumentations, which keeps their dtype, while the last batch is learnt from;
    those on a GPU by kornia, as a batch, which gives float32. Both interpolate linearly, draw from the same ranges, and
    go on beyond the border with its pixels, for zero would be darker than the camera's offset. Flips move pixels alone.
    """
    if not (flips or rotate_deg or scale or shift):
        return None
    if not (rotate_deg or scale or shift):
        return mirror_and_turn

    @cache  # both are slow to import
    def warp(device: str) -> Geometry:
        return (warp_on_host if device == "cpu" else warp_as_batch)(rotate_deg, scale, shift)

    def apply(raw: Tensor, seed: int) -> Tensor:
        return warp(raw.device.type)(mirror_and_turn(raw, seed) if flips else raw, seed)

    return apply


def warp_on_host(rotate_deg: float, scale: float, shift: float) -> Geometry:
    """Return albumentations' affine warp of each crop of a (B, C, Y, X) batch in host memory, any dtype."""
    import albumentations as albu

    affine = albu.Affine(
        rotate=(-rotate_deg, rotate_deg), scale=(1 - scale, 1 + scale), translate_percent=(-shift, shift),
        keep_ratio=True, border_mode=1, p=1.0,
    )  # fmt: skip
    compose = albu.Compose([affine])

    def apply(raw: Tensor, seed: int) -> Tensor:
        compose.set_random_seed(seed % 2**32)
        crops = raw.numpy().transpose(0, 2, 3, 1)
        warped = np.stack([compose(image=np.ascontiguousarray(crop))["image"] for crop in crops])
        return torch.from_numpy(np.ascontiguousarray(warped.transpose(0, 3, 1, 2)))

    return apply


def warp_as_batch(rotate_deg: float, scale: float, shift: float) -> Geometry:
    """Return kornia's affine warp of a (B, C, Y, X) batch on any device, to float32."""
    import kornia.augmentation as ka

    affine = ka.RandomAffine(
        rotate_deg, (shift, shift), (1 - scale, 1 + scale), padding_mode="border", align_corners=True, p=1.0
    )

    def apply(raw: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng(_drawing(raw)):
            torch.manual_seed(seed)
            return affine(raw.to(torch.float32))  # type: ignore[no-any-return]

    return apply


def _drawing(images: Tensor) -> list[torch.device]:
    """Return the devices whose random stream kornia moves."""
    return [images.device] if images.is_cuda else []


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
