"""Free latents, one row a training cell, updated by an Adam that touches only the rows of the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]  # concatenates a tensor's rows over all ranks


class LatentTable:
    """Rows of free parameters in host memory, with Adam moments that rest beside them.

    A step reads, updates and writes the rows of the batch alone: the device never holds more than a batch, and no state
    of a cell outside it is computed with. Values and both moments of all cells rest in host memory (and in `last`
    checkpoints): 12 bytes a latent dimension and row, the moments from a cell's first step on.
    Each row counts its own steps: a row's path equals that of `torch.optim.Adam` on that row alone, stepped when drawn.

    Parameters
    ----------
    rows, dim
        Size of the table.
    std
        Standard deviation of the Gaussian start.
    """

    BETAS, EPS = (0.9, 0.999), 1e-8  # Kingma & Ba 2015

    def __init__(self, rows: int, dim: int, std: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.values = torch.randn(rows, dim, generator=generator) * std
        self.first, self.second = torch.zeros(rows, dim), torch.zeros(rows, dim)
        self.steps = torch.zeros(rows)
        self._drawn: tuple[Tensor, Tensor] | None = None

    def draw(self, rows: Tensor) -> Tensor:
        """Return the values of distinct rows on their device, as a leaf whose gradient `step` will use."""
        leaf = self.values[rows.cpu()].to(rows.device).requires_grad_(torch.is_grad_enabled())
        self._drawn = (rows, leaf)
        return leaf

    def read(self, rows: Tensor) -> Tensor:
        """Return the values of rows on their device, not to be updated."""
        return self.values[rows.cpu()].to(rows.device)

    @torch.no_grad()
    def step(self, lr: float, gather: Gather = lambda x: x, ranks: int = 1) -> None:
        """Update the rows drawn last, on every rank alike; `ranks` averages the gradient as over one large batch."""
        assert self._drawn is not None, "draw before step"
        rows, leaf = self._drawn
        self._drawn = None
        grad = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        r, g = gather(rows).cpu(), gather(grad.float()).cpu() / ranks
        if not len(r):
            return
        t = self.steps[r] + 1
        m = self.first[r].lerp_(g, 1 - self.BETAS[0])
        v = self.second[r].lerp_(g.square(), 1 - self.BETAS[1])
        m_hat = m / (1 - self.BETAS[0] ** t)[:, None]
        v_hat = v / (1 - self.BETAS[1] ** t)[:, None]
        self.values[r] -= lr * m_hat / (v_hat.sqrt() + self.EPS)
        self.first[r], self.second[r], self.steps[r] = m, v, t

    def state(self) -> dict[str, Tensor]:
        """Return everything a checkpoint needs, not copied."""
        return {"values": self.values, "first": self.first, "second": self.second, "steps": self.steps}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""
        for name, value in self.state().items():
            value.copy_(state[name])
