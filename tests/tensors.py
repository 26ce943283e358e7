"""Tensors that tests of losses start from, and descent."""

import torch


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaves(*shapes):
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def descend(loss, *free, steps=200, lr=0.05):
    """Lower a loss of some leaves by Adam; return it before and after."""
    before, optimizer = loss().item(), torch.optim.Adam(free, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return before, loss().item()
