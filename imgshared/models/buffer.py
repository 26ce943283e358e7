"""Pool of generated images that a discriminator sees again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ImageBuffer(nn.Module):
    """The last generated images, some of which stand in for new ones (Shrivastava et al. 2017, section 2.3).

    A discriminator that sees only the newest fakes forgets the older ones; CycleGAN keeps 50. Everything is in buffers:
    a checkpoint goes on exactly. Each process has its own pool, of what it has translated; see `pool_state`.

    Parameters
    ----------
    size
        Images to keep; 0 for none.
    shape
        (C, Y, X) of an image.
    """

    images: Tensor
    markers: Tensor
    count: Tensor

    def __init__(self, size: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("markers", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def exchange(self, images: Tensor, markers: Tensor) -> tuple[Tensor, Tensor]:
        """Return (P, C, Y, X) images and their (P,) int64 markers, some swapped for stored ones, without gradient.

        Until the pool is full new images are stored and returned; then each is, with probability 1/2, stored in the
        place of an old one that is returned instead. Draws from torch's global generator on the CPU, on any device.
        """
        size = len(self.images)
        if not size:
            return images.detach(), markers
        images, markers = images.clone(), markers.clone()
        swaps, places = torch.rand(len(images)).lt(0.5).tolist(), torch.randint(size, (len(images),)).tolist()
        count = int(self.count)
        for i, (swap, place) in enumerate(zip(swaps, places, strict=True)):
            if count < size:
                self.images[count], self.markers[count] = images[i], markers[i]
                count += 1
            elif swap:
                image, marker = self.images[place].clone(), self.markers[place].clone()
                self.images[place], self.markers[place] = images[i], markers[i]
                images[i], markers[i] = image, marker
        self.count.fill_(count)
        return images, markers


def pool_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the entries of a module's state dict that are its pools: all that differs between processes."""
    pools = tuple(f"{name}." for name, child in module.named_modules() if isinstance(child, ImageBuffer))
    return {name: value for name, value in module.state_dict().items() if name.startswith(pools)}
