"""The bound of predicted spreads: where it lies, where it starts, that it lets a gradient through."""

import pytest
import torch

from imgshared.models.bounds import soft_bound


@pytest.mark.parametrize(("start", "middle"), [(None, -2.0), (0.0, 0.0), (1.0, 1.0)])
def test_it_starts_where_asked_and_ends_at_its_bounds(start, middle):
    raw = torch.tensor([-1e6, -99.0, 0.0, 99.0, 1e6], requires_grad=True)
    bounded = soft_bound(raw, -6.0, 2.0, start)
    assert bounded.tolist() == [-6.0, -6.0, middle, 2.0, 2.0]
    bounded.sum().backward()
    assert raw.grad[2] == 1
    assert raw.grad.isfinite().all()


def test_it_rises_everywhere_and_keeps_a_gradient_where_a_clamp_has_none():
    raw = torch.linspace(-15, 8, 400, requires_grad=True)
    bounded = soft_bound(raw, -6.0, 2.0, 0.0)
    assert (bounded.diff() > 0).all()
    bounded.sum().backward()
    assert (raw.grad > 0).all()
