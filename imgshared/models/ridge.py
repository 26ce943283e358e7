"""Ridge regression of stains' pixels on Gaussian blurs of other stains: all that it keeps are its normal equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn


class Equations(NamedTuple):
    """Sums over the pixels of T targets in F features, in float64.

    Parameters
    ----------
    xx, xy, yy
        (T, F, F), (T, F) and (T,): features by features, features by target, target squared. The last feature is 1, so
        ``xx[:, -1, -1]`` counts the pixels.
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor


class BlurredRidge(nn.Module):
    """Linear regression of each target's pixel on blurs of the sources around it and a constant.

    Minimises sum (y - w x)^2 + ridge n m |w|^2 for n pixels with mean squared feature m; the constant goes free.
    The equations are buffers: a checkpoint holds the fit, and images of any size can be predicted with it.

    Parameters
    ----------
    sources, targets
        Numbers of channels.
    sigmas
        Of the blurs, in pixels; 0 is the image itself. See `fitting`.
    ridge
        Penalty, relative to the mean squared feature, that keeps nearly equal blurs apart.
    pixels
        Of each image that are fitted on, drawn at random; all of them where there are no more.
    """

    xx: Tensor
    xy: Tensor

    def __init__(
        self, sources: int, targets: int, sigmas: Sequence[float], *, ridge: float = 1e-5, pixels: int = 256
    ) -> None:
        super().__init__()
        self.sigmas, self.ridge, self.pixels = tuple(sigmas), ridge, pixels
        features = sources * len(self.sigmas) + 1
        self.register_buffer("xx", torch.zeros(targets, features, features, dtype=torch.float64))
        self.register_buffer("xy", torch.zeros(targets, features, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move along to devices that know float64; MPS does not, there the equations stay where they are."""
        if fn(torch.zeros(0)).device.type == "mps":
            return self
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    @torch.no_grad()
    def equations(
        self, images: Tensor, stains: Tensor, shown: Tensor, generator: torch.Generator | None = None
    ) -> Equations:
        """Return the equations of some images, not yet taken in.

        Parameters
        ----------
        images, stains
            (B, S, Y, X) sources and (B, T, Y, X) targets.
        shown
            (B, T) bool, which target counts in which image.
        generator
            Of the pixels that are drawn, on the CPU; None: torch's global one.
        """
        pixel = self._draw(len(images), images.shape[2] * images.shape[3], generator).to(images.device)
        x = torch.cat([_at(blur(images, sigma), pixel) for sigma in self.sigmas], 1)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # (B, F, P)
        x, y, counts = (part.to(self.xx.device).double() for part in (x, _at(stains, pixel), shown))
        return Equations(
            torch.einsum("bt,bfg->tfg", counts, x @ x.mT),
            torch.einsum("bt,btf->tf", counts, y @ x.mT),
            torch.einsum("bt,btp->t", counts, y.square()),
        )

    def _draw(self, images: int, size: int, generator: torch.Generator | None) -> Tensor:
        if self.pixels >= size:
            return torch.arange(size).expand(images, size)
        return torch.randint(size, (images, self.pixels), generator=generator)

    def add(self, equations: Equations) -> None:
        """Take equations in."""
        self.xx += equations.xx
        self.xy += equations.xy

    def weights(self) -> Tensor:
        """Solve for the (T, F) float64 weights, by sigma then source, the constant last; 0 for a target never shown."""
        pixels = self.xx[:, -1, -1]
        penalty = (self.ridge * self.xx.diagonal(dim1=1, dim2=2).mean(1))[:, None].repeat(1, self.xx.shape[1])
        penalty[:, -1] = 0
        penalty[pixels == 0] = 1  # 0 w = 0 has many solutions
        weights: Tensor = torch.linalg.solve(self.xx + torch.diag_embed(penalty), self.xy)
        return weights

    def squared_error(self, equations: Equations) -> Tensor:
        """Mean squared error of the present fit on the pixels of some equations, over all targets; 0 without any."""
        w = self.weights()
        squared = equations.yy - 2 * (w * equations.xy).sum(1) + torch.einsum("tf,tfg,tg->t", w, equations.xx, w)
        return squared.sum().clamp_min(0) / equations.xx[:, -1, -1].sum().clamp_min(1)

    def forward(self, images: Tensor, targets: Sequence[int] | None = None) -> Tensor:
        """Predict (B, T, Y, X) float32 targets, all or some, from (B, S, Y, X) sources of any size."""
        w = self.weights()[slice(None) if targets is None else list(targets)].float().to(images.device)
        out = w[:, -1, None, None].expand(len(images), -1, *images.shape[2:]).clone()
        with torch.autocast(images.device.type, enabled=False):
            for sigma, part in zip(self.sigmas, w[:, :-1].split(images.shape[1], 1), strict=True):
                out += torch.einsum("ts,bsyx->btyx", part, blur(images, sigma))
        return out


def fitting(sigmas: Sequence[float], crop_px: int) -> list[float]:
    """Return the blurs that crops can teach: those no wider than half of one."""
    return [sigma for sigma in sigmas if 2 * sigma <= crop_px]


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (..., Y, X) images in float32, cut off at 4 sigma, borders mirrored (b a | a b).

    As products with square matrices: a blur costs the same however wide, and may be wider than the image.
    """
    images = images.float()
    if not sigma:
        return images
    with torch.autocast(images.device.type, enabled=False):  # which would round to bf16
        rows, columns = (_blur_matrix(side, sigma).float().to(images.device) for side in images.shape[-2:])
        return rows @ images @ columns.mT


def _blur_matrix(side: int, sigma: float) -> Tensor:
    """(side, side) float64 weights by which each pixel gathers the others along an axis."""
    reach = int(4 * sigma + 0.5)
    steps = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (steps / sigma).double().square())
    at = (torch.arange(side)[:, None] + steps) % (2 * side)  # mirroring repeats every two sides
    at = torch.where(at < side, at, 2 * side - 1 - at)
    return torch.zeros(side, side, dtype=torch.float64).scatter_add_(1, at, (weights / weights.sum()).expand_as(at))


def _at(images: Tensor, pixel: Tensor) -> Tensor:
    """(B, C, Y, X) images at (B, P) pixels, to (B, C, P)."""
    return images.flatten(2).gather(2, pixel[:, None].expand(-1, images.shape[1], -1))
