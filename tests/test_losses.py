import numpy as np
import pytest
import torch
from tensors import descend, leaves, normal
from torch.autograd import gradcheck
from torch.distributions import Laplace, Normal, kl_divergence

from imgshared.losses import (
    adversarial_discriminator,
    adversarial_generator,
    cross_covariance,
    gaussian_kl,
    hsic,
    info_nce,
    kl_per_dimension,
    latent_norm,
    patch_nce,
    pixel_loss,
    r1_penalty,
    reconstruction,
    triplet,
)

PIXEL, ADVERSARIAL = ("l1", "l2", "laplace", "gaussian"), ("lsgan", "hinge", "bce")


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


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_descending_reconstruction_draws_the_target(kind):
    logits, target = normal(2, 1, 3, 3), torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    leaf = logits.clone().requires_grad_()
    assert gradcheck(lambda x: reconstruction(x, target, kind), leaf, eps=1e-2, atol=1e-2)  # it computes in float32
    descend(lambda: reconstruction(leaf, target, kind), leaf, steps=600)
    torch.testing.assert_close(torch.sigmoid(leaf.detach()).float(), target, atol=0.02, rtol=0)


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


def test_descending_the_norm_shrinks_a_latent():
    z = normal(4, 3).requires_grad_()
    descend(lambda: latent_norm(z), z, steps=400, lr=0.02)
    assert z.detach().abs().max() < 0.05


def test_kl_is_the_integral_of_the_log_ratio():
    mean, log_std, x = 0.7, -0.4, np.linspace(-12, 12, 40_001)
    std = np.exp(log_std)
    log_p = -0.5 * ((x - mean) / std) ** 2 - np.log(std)
    integral = np.trapezoid(np.exp(log_p) * (log_p + 0.5 * x**2), x) / np.sqrt(2 * np.pi)
    found = gaussian_kl(torch.full((1, 2), mean).double(), torch.full((1, 2), log_std).double())
    assert found.item() == pytest.approx(integral, rel=1e-6)


def test_kl_agrees_with_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, log_std = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(gaussian_kl(mean, log_std), expected)
    assert gradcheck(gaussian_kl, (mean.requires_grad_(), log_std.requires_grad_()))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def nce(query, keys, temperature):
    """InfoNCE of (N, D) arrays, in loops: key i is the positive of query i."""
    total = 0.0
    for i, q in enumerate(unit(query)):
        scores = np.exp([q @ k / temperature for k in unit(keys)])
        total -= np.log(scores[i] / scores.sum())
    return total / len(query)


def matches(a, b):
    """Share of rows of `a` whose nearest row of `b`, by cosine, is their own."""
    cosines = torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).mT
    return (cosines.argmax(-1) == torch.arange(a.shape[-2])).double().mean().item()


def test_kl_per_dimension_tells_which_dimension_carries_something():
    mean, log_std = leaves((6, 5), (6, 5))
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(kl_per_dimension(mean, log_std), expected)
    assert gradcheck(kl_per_dimension, (mean, log_std))
    still = kl_per_dimension(torch.tensor([[0.0, 2.0], [0.0, -2.0]]), torch.zeros(2, 2))
    torch.testing.assert_close(still, torch.tensor([0.0, 2.0]))
    descend(lambda: gaussian_kl(mean, log_std), mean, log_std, steps=400)
    assert mean.abs().max() < 0.1
    assert log_std.abs().max() < 0.1


def test_pixel_loss_is_the_error_or_the_negative_log_likelihood():
    mean, target, log_scale = (normal(2, 1, 3, 3, seed=i) for i in range(3))
    error, scale = (target - mean).numpy(), log_scale.exp().numpy()
    expected = {
        "l1": np.abs(error).mean(),
        "l2": (error**2).mean(),
        "laplace": -np.log(np.exp(-np.abs(error) / scale) / (2 * scale)).mean(),
        "gaussian": -np.log(np.exp(-0.5 * (error / scale) ** 2) / (scale * np.sqrt(2 * np.pi))).mean(),
    }
    for kind in PIXEL:
        assert pixel_loss(mean, target, kind, log_scale).item() == pytest.approx(expected[kind])
    for kind, law in (("laplace", Laplace), ("gaussian", Normal)):
        torch.testing.assert_close(
            pixel_loss(mean, target, kind, log_scale), -law(mean, log_scale.exp()).log_prob(target).mean()
        )
        torch.testing.assert_close(pixel_loss(mean, target, kind), -law(mean, 1.0).log_prob(target).mean())
    zero = torch.zeros(1, 1, 2, 2)
    closed = [0.5, 0.25, 0.5 + np.log(2), 0.125 + 0.5 * np.log(2 * np.pi)]
    assert [pixel_loss(zero, zero + 0.5, kind).item() for kind in PIXEL] == pytest.approx(closed)


@pytest.mark.parametrize("kind", PIXEL)
def test_descending_pixel_loss_finds_the_target_and_its_spread(kind):
    mean, log_scale = leaves((2, 1, 2, 2), (2, 1, 2, 2))
    target = normal(2, 1, 2, 2, seed=5)
    assert gradcheck(lambda m, s: pixel_loss(m, target, kind, s) + 0 * s.sum(), (mean, log_scale))
    start = (mean - target).abs().mean().item()
    descend(lambda: pixel_loss(mean, target, kind), mean)
    assert (mean - target).abs().mean() < 0.1 * start
    if kind in ("laplace", "gaussian"):
        one, error = torch.zeros(1, dtype=torch.float64, requires_grad=True), normal(500, seed=6) * 0.3
        descend(lambda: pixel_loss(torch.zeros_like(error), error, kind, one), one, steps=400)
        spread = error.abs().mean() if kind == "laplace" else error.square().mean().sqrt()
        assert one.exp().item() == pytest.approx(spread.item(), rel=0.01)


@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_patch_nce_is_infonce_over_positions(negatives):
    query, key = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    q, k = query.numpy(), key.numpy()
    if negatives == "image":
        expected = np.mean([nce(q[i], k[i], 0.07) for i in range(3)])
    else:
        expected = nce(q.reshape(12, 5), k.reshape(12, 5), 0.07)
    assert patch_nce(query, key, negatives=negatives).item() == pytest.approx(expected)
    assert patch_nce(2 * query, 3 * key, negatives=negatives).item() == pytest.approx(expected)
    same, others = torch.ones(2, 4, 5), 4 if negatives == "image" else 8
    assert patch_nce(same, same, negatives=negatives).item() == pytest.approx(np.log(others))
    query.requires_grad_()
    key.requires_grad_()
    assert gradcheck(lambda q: patch_nce(q, key.detach(), negatives=negatives), query)
    assert matches(query.detach(), key.detach()) < 0.75
    descend(lambda: patch_nce(query, key, negatives=negatives), query)
    assert key.grad is None
    assert matches(query.detach(), key.detach()) == 1


def test_patch_nce_of_one_position_is_zero_and_of_black_patches_has_a_finite_gradient():
    assert patch_nce(normal(2, 1, 5), normal(2, 1, 5, seed=1)).item() == 0
    query = torch.zeros(2, 4, 5, requires_grad=True)
    patch_nce(query, torch.ones(2, 4, 5)).backward()
    assert torch.equal(query.grad, torch.zeros(2, 4, 5))


def test_info_nce_is_the_mean_of_both_directions():
    a, b = leaves((6, 4), (6, 4))
    x, y = a.detach().numpy(), b.detach().numpy()
    expected = (nce(x, y, 0.1) + nce(y, x, 0.1)) / 2
    assert info_nce(a, b).item() == info_nce(b, 5 * a).item() == pytest.approx(expected)
    apart = torch.eye(2)
    assert info_nce(apart, apart, temperature=1.0).item() == pytest.approx(np.log(1 + np.exp(-1)))
    assert gradcheck(info_nce, (a, b))
    assert matches(a, b) < 0.75
    descend(lambda: info_nce(a, b), a, b)
    assert matches(a, b) == 1


def test_triplet_takes_the_nearest_other_row_as_the_negative():
    a, b = leaves((6, 4), (6, 4))
    x, y = unit(a.detach().numpy()), unit(b.detach().numpy())
    expected = 0.0
    for i in range(6):
        nearest = min(np.linalg.norm(x[i] - y[j]) for j in range(6) if j != i)
        expected += max(0, np.linalg.norm(x[i] - y[i]) - nearest + 0.2) / 6
    assert triplet(a, b).item() == triplet(a, 5 * b).item() == pytest.approx(expected)
    apart = torch.eye(2)
    assert triplet(apart, apart).item() == 0
    assert triplet(apart, apart.flip(0)).item() == pytest.approx(2**0.5 + 0.2)
    assert gradcheck(triplet, (a, b))
    assert descend(lambda: triplet(a, b), a, b)[1] < 1e-6
    assert matches(a, b) == 1


@pytest.mark.parametrize("loss", [info_nce, triplet, hsic])
def test_one_row_gives_zero_with_a_gradient(loss):
    a, b = leaves((1, 4), (1, 4))
    value = loss(a, b)
    value.backward()
    assert value.item() == 0
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_adversarial_losses_are_the_papers():
    real, fake = (normal(3, 1, 2, 2, seed=i) * 2 for i in range(2))
    r, f = real.numpy(), fake.numpy()
    p_real, p_fake = 1 / (1 + np.exp(-r)), 1 / (1 + np.exp(-f))
    generator = {"lsgan": ((f - 1) ** 2).mean(), "hinge": -f.mean(), "bce": -np.log(p_fake).mean()}
    critic = {
        "lsgan": (((r - 1) ** 2).mean() + (f**2).mean()) / 2,
        "hinge": np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean(),
        "bce": -(np.log(p_real).mean() + np.log(1 - p_fake).mean()) / 2,
    }
    zero = torch.zeros(2, 3)
    closed = {"lsgan": (1, 0.5), "hinge": (0, 2), "bce": (np.log(2), np.log(2))}
    for kind in ADVERSARIAL:
        assert adversarial_generator(fake, kind).item() == pytest.approx(generator[kind])
        assert adversarial_discriminator(real, fake, kind).item() == pytest.approx(critic[kind])
        at_zero = adversarial_generator(zero, kind).item(), adversarial_discriminator(zero, zero, kind).item()
        assert at_zero == pytest.approx(closed[kind])


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_a_generator_raises_its_logits_and_a_discriminator_tells_them_apart(kind):
    real, fake = leaves((3, 1, 2, 2), (3, 1, 2, 2))
    assert gradcheck(lambda f: adversarial_generator(f, kind), fake)
    assert gradcheck(lambda r, f: adversarial_discriminator(r, f, kind), (real, fake))
    start = fake.mean().item()
    descend(lambda: adversarial_generator(fake, kind), fake, steps=30)
    assert fake.mean() > start + 0.5
    descend(lambda: adversarial_discriminator(real, fake, kind), real, fake)
    assert real.min() > fake.max()


def test_r1_is_half_the_squared_slope_and_flattens_a_critic():
    weight, images = leaves((4,), (5, 1, 2, 2))

    def penalty(w, x):
        return r1_penalty(x.flatten(1).tanh() @ w, x)

    slopes = (1 - np.tanh(images.detach().numpy().reshape(5, 4)) ** 2) * weight.detach().numpy()
    expected = np.mean([0.5 * (s**2).sum() for s in slopes])
    assert penalty(weight, images).item() == pytest.approx(expected)
    linear = r1_penalty(images.flatten(1) @ weight, images)
    assert linear.item() == pytest.approx(0.5 * weight.square().sum().item())
    assert gradcheck(penalty, (weight, images))
    descend(lambda: r1_penalty(images.flatten(1) @ weight, images), weight)
    assert weight.abs().max() < 0.01


@pytest.mark.parametrize("autocast", [False, True])
def test_half_types_give_float32(autocast):
    x, y = (normal(4, 3, 5, seed=i).bfloat16() for i in range(2))
    rows = x[:, 0], y[:, 0]
    calls = [
        *((pixel_loss, (x, y, kind, y)) for kind in PIXEL),
        *((adversarial_generator, (x, kind)) for kind in ADVERSARIAL),
        *((adversarial_discriminator, (x, y, kind)) for kind in ADVERSARIAL),
        *((loss, rows) for loss in (info_nce, triplet, hsic, cross_covariance, gaussian_kl, kl_per_dimension)),
        *((patch_nce, (x, y)),),
    ]
    for loss, given in calls:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(*given)
        exact = loss(*(g.float() if isinstance(g, torch.Tensor) else g for g in given))
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-7)
    leaf = x.clone().requires_grad_()
    assert r1_penalty(leaf.square().sum((1, 2)), leaf).dtype == torch.float32
