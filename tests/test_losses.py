import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence

from imgshared.losses import gaussian_kl, latent_norm, reconstruction


def images(seed=0):
    rng = np.random.default_rng(seed)
    logits, target = rng.normal(0, 2, (3, 1, 5, 5)), rng.uniform(-0.3, 1.4, (3, 1, 5, 5))
    return logits, target, torch.tensor(logits).float(), torch.tensor(target).float()


def test_bce_is_the_mean_negative_log_likelihood_of_the_clamped_target():
    logits, target, a, b = images()
    p, t = 1 / (1 + np.exp(-logits)), target.clip(0, 1)
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    assert reconstruction(a, b, "bce").item() == pytest.approx(expected, rel=1e-5)


def test_mse_is_the_squared_error_of_the_sigmoid_of_the_raw_target():
    logits, target, a, b = images()
    expected = ((1 / (1 + np.exp(-logits)) - target) ** 2).mean()
    assert reconstruction(a, b, "mse").item() == pytest.approx(expected, rel=1e-5)


def test_closed_forms():
    zero, half = torch.zeros(2, 1, 3, 3), torch.full((2, 1, 3, 3), 0.5)
    for target in (zero, half):
        assert reconstruction(zero, target, "bce").item() == pytest.approx(np.log(2))
    assert reconstruction(zero, half, "mse").item() == 0
    assert reconstruction(torch.full_like(zero, 80.0), torch.full_like(zero, 1.2), "bce").item() == pytest.approx(0)
    assert latent_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).item() == pytest.approx((5 + 0) / 2 / 2, abs=1e-5)
    assert gaussian_kl(torch.zeros(4, 3), torch.zeros(4, 3)).item() == 0


def test_gradients_of_reconstruction_are_the_textbook_ones():
    _, _, a, b = images()
    for kind in ("bce", "mse"):
        leaf = a.clone().requires_grad_()
        reconstruction(leaf, b, kind).backward()
        p = torch.sigmoid(a)
        expected = p - b.clamp(0, 1) if kind == "bce" else 2 * (p - b) * p * (1 - p)
        torch.testing.assert_close(leaf.grad, expected / a.numel())


def test_reconstruction_is_float32_whatever_the_autocast():
    _, _, a, b = images()
    expected = reconstruction(a.bfloat16().float(), b, "bce")
    with torch.autocast("cpu", torch.bfloat16):
        loss = reconstruction(a.bfloat16(), b, "bce")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_latent_norm_is_the_mean_norm_over_the_dimension():
    z = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert latent_norm(z).item() == pytest.approx(np.linalg.norm(z.numpy(), axis=1).mean() / 4)
    assert gradcheck(latent_norm, z.requires_grad_())


def test_latent_norm_has_a_finite_gradient_at_zero():
    z = torch.zeros(3, 4, requires_grad=True)
    latent_norm(z).backward()
    assert torch.equal(z.grad, torch.zeros(3, 4))


def test_kl_agrees_with_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, log_std = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(gaussian_kl(mean, log_std), expected)
    assert gradcheck(gaussian_kl, (mean.requires_grad_(), log_std.requires_grad_()))
