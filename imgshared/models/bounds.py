"""Bounds of predicted spreads."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_SCALE = (-6.0, 2.0)  # of a predicted pixel's scale: a fraction of a camera count on [0, 1], and far beyond it


def soft_bound(raw: Tensor, low: float, high: float, start: float | None = None) -> Tensor:
    """Keep values between `low` and `high`, smoothly: beyond a clamp there is no gradient, and none could come back.

    `start`, which 0 becomes, lies between them, by default in the middle; the slope there is 1.
    """
    start = (low + high) / 2 if start is None else start
    room = torch.where(raw > 0, high - start, start - low)
    return start + room * torch.tanh(raw / room)
