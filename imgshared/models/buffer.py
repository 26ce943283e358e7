"""What a method keeps of earlier steps: images that a discriminator sees again, latents beside those of a few cells."""

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


class LatentMemory(nn.Module):
    """The last latents of each marker, beside those of a batch too small to judge by (Wang et al. 2020, XBM).

    A network changes little in a few steps: what it said then stands for what it would say now. What it said long ago
    does not, and is forgotten. As with `ImageBuffer`, all is in buffers, and each process has its own.

    Parameters
    ----------
    markers, size, width
        Number of markers, of rows that are kept of each (0: none), of latents in a row.
    age
        Steps after which a row is forgotten.
    """

    rows: Tensor
    born: Tensor
    kept: Tensor
    now: Tensor

    def __init__(self, markers: int, size: int, width: int, age: int = 100) -> None:
        super().__init__()
        self.age = age
        self.register_buffer("rows", torch.zeros(markers, size, width))
        self.register_buffer("born", torch.full((markers, size), -age - 1))
        self.register_buffer("kept", torch.zeros(markers, dtype=torch.int64))
        self.register_buffer("now", torch.zeros((), dtype=torch.int64))

    def step(self) -> None:
        """All that is remembered is a step older."""
        self.now += 1

    def beside(self, marker: int, new: Tensor) -> Tensor:
        """(n, width) rows of a step, then the remembered ones, without gradient; the new ones are remembered."""
        fresh = self.now - self.born[marker] <= self.age
        past = self.rows[marker][fresh]
        size = self.rows.shape[1]
        if size:
            last = new.detach()[-size:]
            places = (self.kept[marker] + torch.arange(len(last), device=new.device)) % size
            self.rows[marker, places] = last.to(self.rows.dtype)
            self.born[marker, places] = self.now
            self.kept[marker] += len(last)
        return torch.cat([new, past.to(new.dtype)])


def pool_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the entries of a module's state dict that are its pools: all that differs between processes."""
    kinds = (ImageBuffer, LatentMemory)
    pools = tuple(f"{name}." for name, child in module.named_modules() if isinstance(child, kinds))
    return {name: value for name, value in module.state_dict().items() if name.startswith(pools)}
