"""The residual generator of CycleGAN and CUT, conditioned on the marker."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MARKER_DIM = 64
LEVELS = 5  # that `ResnetGenerator.features` knows


class ResnetGenerator(nn.Module):
    """One stain to another: 7x7 convolution, two halvings, residual blocks, two doublings, 7x7 convolution.

    This is CycleGAN's; CUT's published one resamples with a blur against aliasing and has 9 blocks at any size.
    The generator of Johnson et al. 2016 as in CycleGAN (Zhu et al. 2017, section 7.2): reflection padding, instance
    norm without gains, ReLU, weights from N(0, 0.02^2). The output is linear, where the papers end in tanh for images
    in [-1, 1]: ours are about [0, 1] and not clipped. Instance norm takes mean and variance over the whole image: what
    is predicted at a pixel depends on all of the tile that is shown, and brightness and contrast of the tile are lost.

    Parameters
    ----------
    width
        Channels of the first convolution; the residual blocks have four times as many.
    blocks
        Residual blocks; the papers have 6 for images of 128 px and 9 from 256 px on.
    markers
        How many stains to tell apart; 0 for no condition. An embedding of the marker scales and shifts what comes out
        of the residual blocks' instance norms (after Dumoulin et al. 2017, eq. 5), not at all at the start. What comes
        before the blocks is the same for all stains.
    """

    def __init__(self, width: int, blocks: int, *, markers: int = 0) -> None:
        super().__init__()
        # the fifth of nine is the middle block, as in CUT
        self._places = (0, 1, 2, 3, 2 + (blocks + 1) // 2)
        self.widths = (1, 2 * width, 4 * width, 4 * width, 4 * width)
        self.stem = nn.Conv2d(1, width, 7, padding=3, padding_mode="reflect", bias=False)  # a norm would cancel a bias
        self.down = nn.ModuleList(nn.Conv2d(n, 2 * n, 3, 2, 1, bias=False) for n in (width, 2 * width))
        self.blocks = nn.ModuleList(_Block(4 * width, MARKER_DIM if markers else 0) for _ in range(blocks))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(n, n // 2, 3, 2, 1, output_padding=1, bias=False) for n in (4 * width, 2 * width)
        )
        self.last = nn.Conv2d(width, 1, 7, padding=3, padding_mode="reflect")
        self.embedding = nn.Embedding(markers, MARKER_DIM) if markers else None
        self.apply(_start)

    def forward(self, images: Tensor, marker: Tensor | None = None) -> Tensor:
        """Translate (P, 1, Y, X) images of any size from 8 px on to (P,) int64 markers; float32 of the same shape."""
        y, x = images.shape[2:]
        padded, top, left = _pad(images)
        h = self._encode(padded, marker, len(self.blocks))[-1]
        for double in self.up:
            h = F.relu(_norm(double(h)))
        with torch.autocast(h.device.type, enabled=False):  # bf16 would round an intensity near 1 to 1/128
            out: Tensor = self.last(h.float())
        return out[:, :, top : top + y, left : left + x]

    def features(self, images: Tensor, levels: Sequence[int], marker: Tensor | None = None) -> list[Tensor]:
        """Return what the encoding half makes of (P, 1, Y, X) images, at some of its levels in the order asked.

        The levels of CUT (Park et al. 2020, appendix; layers 0, 4, 8, 12, 16 of its code): 0 the image, 1 and 2 the
        convolutions of the two halvings before their norms, 3 the first residual block, 4 the middle one; of `widths`
        channels. From level 3 on the features of two images compare only where the marker is the same.
        """
        places = [self._places[level] for level in levels]
        maps = [images, *self._encode(_pad(images)[0], marker, max(0, *places, 2) - 2)]
        return [maps[place] for place in places]

    def _encode(self, padded: Tensor, marker: Tensor | None, blocks: int) -> list[Tensor]:
        """Return the maps of the two halvings and of so many residual blocks."""
        condition = None
        if self.embedding is not None:
            assert marker is not None, "a conditioned generator needs the markers"
            condition = self.embedding(marker)
        maps = []
        h = F.relu(_norm(self.stem(padded)))
        for halve in self.down:
            maps.append(halve(h))
            h = F.relu(_norm(maps[-1]))
        for block in self.blocks[:blocks]:
            h = block(h, condition)
            maps.append(h)
        return maps


class _Block(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), both norms scaled and shifted by a condition."""

    def __init__(self, width: int, condition_dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False) for _ in range(2)
        )
        self.modulation = nn.Linear(condition_dim, 4 * width) if condition_dim else None

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        first, second = self.convolutions
        if self.modulation is None:
            return x + _norm(second(F.relu(_norm(first(x)))))
        scale_1, shift_1, scale_2, shift_2 = self.modulation(condition)[:, :, None, None].chunk(4, 1)
        h = F.relu(_norm(first(x)) * (1 + scale_1) + shift_1)
        out: Tensor = x + _norm(second(h)) * (1 + scale_2) + shift_2
        return out


def _norm(x: Tensor) -> Tensor:
    """Instance norm, put back to channels_last; group_norm keeps that, but doubles the step's time in bf16 on a CPU."""
    return F.instance_norm(x).contiguous(memory_format=torch.channels_last)


def _pad(images: Tensor) -> tuple[Tensor, int, int]:
    """Repeat the edges up to a multiple of 4 px, evenly on both sides; also return the rows and columns put before."""
    y, x = (-side % 4 for side in images.shape[2:])
    if not (y or x):
        return images, 0, 0
    return F.pad(images, (x // 2, x - x // 2, y // 2, y - y // 2), mode="replicate"), y // 2, x // 2


def _start(layer: nn.Module) -> None:
    """Draw the weights as CycleGAN does; a modulation starts at zero, and so moves with the size of the embedding."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.Linear):
        nn.init.zeros_(layer.weight)
    if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
