"""The scale bar of a picture: how long it is, and the font that can write it."""

from __future__ import annotations

from pathlib import Path

import matplotlib

FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # Pillow's own lacks µ
LENGTHS = tuple(n * 10**k for k in range(5) for n in (1, 2, 5))


def scale_bar(width_px: int, pixel_size_um: float | None) -> tuple[float, str]:
    """Choose the bar of a picture: its length in px, and what it says, e.g. ``"5 µm"``.

    It is 1, 2 or 5 times a power of ten long, at least 1, else at most a third of the picture's width; where
    micrometres are unknown in px.
    """
    size = pixel_size_um or 1
    length = max((v for v in LENGTHS if v <= width_px * size / 3), default=1)
    return length / size, f"{length} {'µm' if pixel_size_um else 'px'}"
