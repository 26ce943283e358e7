"""Losses of the dependence of two latents: HSIC and cross-covariance."""

import numpy as np
import pytest
import torch
from tensors import descend, leaves, normal
from torch.autograd import gradcheck

from imgshared.losses import cross_covariance, hsic


def slow_hsic(a, b):
    def kernel(x):
        d = np.array([[np.linalg.norm(p - q) for q in x] for p in x])
        pairs = np.sort(d[np.triu_indices(len(x), 1)])
        return np.exp(-(d**2) / (2 * pairs[(len(pairs) - 1) // 2] ** 2))

    h = np.eye(len(a)) - 1 / len(a)
    return np.trace(kernel(a) @ h @ kernel(b) @ h) / (len(a) - 1) ** 2


def test_hsic_is_the_biased_estimate_with_median_bandwidths():
    a, b = leaves((6, 2), (6, 3))
    expected = slow_hsic(a.detach().numpy(), b.detach().numpy())
    assert hsic(a, b).item() == pytest.approx(expected)
    assert hsic(3 * a, b + 7).item() == pytest.approx(expected)
    two = torch.tensor([[0.0], [1.0]])  # K = L = [[1, k], [k, 1]] with k = exp(-1/2), centred (1 - k) / 2
    assert hsic(two, two).item() == pytest.approx((1 - np.exp(-0.5)) ** 2)
    assert hsic(torch.ones(5, 2), torch.randn(5, 2)).item() == 0
    assert hsic(torch.zeros(5, 0), torch.randn(5, 2)).item() == 0
    assert gradcheck(hsic, (a, b))


@pytest.mark.parametrize("loss", [hsic, cross_covariance])
def test_dependence_of_many_columns_falls_and_not_by_shrinking(loss):
    a = normal(32, 48)
    b = (a[:, :16] + 0.3 * normal(32, 16, seed=1)).requires_grad_()
    before = loss(a, b)
    (slope,) = torch.autograd.grad(before, b)
    centred = (b - b.mean(0)).detach()
    assert abs((slope * centred).sum()) < 1e-6 * slope.norm() * centred.norm()  # none of it is a change of scale
    descend(lambda: loss(a, b), b, steps=200)
    assert loss(a, b) < 0.8 * before
    assert b.std() > 0.7 * centred.std()


@pytest.mark.parametrize("loss", [hsic, cross_covariance])
def test_descending_dependence_makes_samples_independent(loss):
    a = normal(60, 1)
    b = (a + 0.3 * normal(60, 1, seed=1)).requires_grad_()

    def correlation():
        return abs(np.corrcoef(a[:, 0], b[:, 0].detach())[0, 1])

    assert correlation() > 0.9
    descend(lambda: loss(a, b), b, steps=500)
    assert correlation() < 0.2
    assert b.std() > 0.2  # not by shrinking


def test_hsic_sees_what_correlation_does_not():
    a = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]
    assert cross_covariance(a, a.square()) < 1e-20
    shuffled = a.square()[torch.randperm(41, generator=torch.Generator().manual_seed(0))]
    assert hsic(a, a.square()) > 3 * hsic(a, shuffled)


def test_hsic_where_most_rows_coincide_is_finite():
    a = torch.zeros(8, 2)
    a[0] = 1.0
    a.requires_grad_()
    value = hsic(a, torch.arange(16.0).reshape(8, 2))
    value.backward()
    assert value > 0
    assert a.grad.isfinite().all()


def test_cross_covariance_is_the_mean_squared_correlation():
    a, b = leaves((7, 2), (7, 3))
    x, y = a.detach().numpy(), b.detach().numpy()
    expected = np.mean([np.corrcoef(x[:, i], y[:, j])[0, 1] ** 2 for i in range(2) for j in range(3)])
    assert cross_covariance(a, b).item() == pytest.approx(expected)
    assert cross_covariance(0.01 * a + 3, -5 * b).item() == pytest.approx(expected)
    assert cross_covariance(a[:, :1], 2 - a[:, :1]).item() == pytest.approx(1)
    assert gradcheck(cross_covariance, (a, b))


def test_a_constant_column_shares_nothing():
    constant = torch.full((9, 1), 1000.1)
    a = torch.cat([constant, torch.arange(9.0)[:, None]], 1).requires_grad_()
    value = cross_covariance(a, torch.arange(9.0)[:, None])
    assert value.item() == pytest.approx(0.5)
    value.backward()
    assert a.grad.isfinite().all()
    assert (a.grad[:, 0] == 0).all()
    assert cross_covariance(a[:1], torch.ones(1, 1)).item() == 0
    assert cross_covariance(torch.zeros(9, 0), a).item() == 0
