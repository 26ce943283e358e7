"""Fusion against loops in NumPy, one cell after the other."""

import numpy as np
import pytest
import torch

from imgshared.models.fusion import fuse_mean, fuse_product

CELLS = torch.tensor([3, 0, 0, 3, 3, 2])  # cell 1 has no stain
SHAPE = (6, 2, 3, 4)


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def test_the_mean_is_of_each_cells_own_stains_as_they_count():
    maps, other = draw()
    weights = other[:, :, 0, 0].exp()
    fused = fuse_mean(maps, weights, CELLS, 4).numpy()
    for cell in range(4):
        own = CELLS.numpy() == cell
        expected = np.zeros(SHAPE[1:])
        if own.any():
            w = np.broadcast_to(weights.numpy()[own][:, :, None, None], maps[own].shape)
            expected = np.average(maps.numpy()[own], axis=0, weights=w)
        np.testing.assert_allclose(fused[cell], expected, rtol=1e-5, atol=1e-6)


def test_a_stain_that_counts_for_nearly_nothing_dilutes_nothing():
    maps = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
    weights = torch.tensor([[1.0, 1e-6], [1e-6, 1.0]])
    fused = fuse_mean(maps, weights, torch.zeros(2, dtype=torch.long), 1)
    torch.testing.assert_close(fused, torch.tensor([[1.0, 5.0]]), atol=1e-5, rtol=0)


def test_one_stain_each_in_order_is_handed_through_and_another_order_is_not():
    maps, weights = draw()[0], torch.rand(6, 2) + 0.1
    assert fuse_mean(maps, weights, torch.arange(6), 6) is maps
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    torch.testing.assert_close(fuse_mean(maps, weights, order, 6), maps[order])


def test_the_mean_of_half_precision_is_summed_in_single():
    maps = torch.tensor([256.0, *[1.0] * 7]).bfloat16()[:, None]  # 256 + 1 is 256 in bfloat16
    fused = fuse_mean(maps, torch.ones(8, 1).bfloat16(), torch.zeros(8, dtype=torch.long), 1)
    assert fused.dtype == torch.bfloat16
    assert fused.item() == torch.tensor(263 / 8).bfloat16().item() != 32


def test_the_product_is_that_of_gaussians_and_a_standard_normal_prior():
    mean, log_std = draw()
    fused, fused_log_std = (x.numpy() for x in fuse_product(mean, log_std, CELLS, 4))
    m, s = mean.double().numpy(), np.exp(log_std.double().numpy())
    for cell in range(4):
        own = CELLS.numpy() == cell
        precision = 1 + (1 / s[own] ** 2).sum(0)
        np.testing.assert_allclose(fused[cell], (m[own] / s[own] ** 2).sum(0) / precision, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.exp(fused_log_std[cell]), precision**-0.5, rtol=1e-4)
    assert not fused[1].any()  # the prior alone: mean 0, standard deviation 1
    assert not fused_log_std[1].any()


def test_the_product_is_the_normalised_density_of_its_factors():
    grid = np.linspace(-8, 8, 4001)
    experts = [(0.0, 1.0), (1.5, 0.5), (-0.3, 2.0)]  # the prior and two experts
    density = np.prod([np.exp(-0.5 * ((grid - m) / s) ** 2) for m, s in experts], axis=0)
    density /= density.sum()
    mean = (grid * density).sum()
    std = np.sqrt(((grid - mean) ** 2 * density).sum())
    m, s = (torch.tensor([e[i] for e in experts[1:]])[:, None] for i in (0, 1))
    fused, log_std = fuse_product(m, s.log(), torch.zeros(2, dtype=torch.long), 1)
    assert fused.item() == pytest.approx(mean, rel=1e-4)
    assert log_std.exp().item() == pytest.approx(std, rel=1e-4)


def test_a_sharper_expert_counts_more_and_half_precision_is_lifted():
    mean, log_std = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [-3.0]])
    fused, spread = fuse_product(mean.bfloat16(), log_std.bfloat16(), torch.zeros(2, dtype=torch.long), 1)
    assert fused.item() > 0.99
    assert spread.item() < -2.99
    assert fused.dtype == spread.dtype == torch.float32


@pytest.mark.parametrize(
    "fuse", [lambda m, s: fuse_mean(m, s[:, :, 0, 0].exp(), CELLS, 4), lambda m, s: fuse_product(m, s, CELLS, 4)[0]]
)
def test_gradients_stay_within_the_cell(fuse):
    mean, log_std = draw()
    mean.requires_grad_()
    fuse(mean, log_std)[3].sum().backward()
    touched = mean.grad.flatten(1).any(1)
    assert touched.tolist() == (CELLS == 3).tolist()
