"""Scales of latent noise: closed forms, and independence of the batch."""

from dataclasses import replace

import pytest
import torch

from imgshared.config import ApolloConfig, MvaeConfig
from imgshared.data.panel import Panel
from imgshared.methods.apollo import Apollo
from imgshared.methods.mvae import Mvae
from imgshared.methods.noise import drawn, fixed_noise

APOLLO = ApolloConfig(channels=(8, 16, 12), shared_channels=8, shared_dim=6, specific_dim=4, marker_dim=5)
MVAE = MvaeConfig(channels=(8, 16, 12), latent_dim=6, marker_dim=5)


def method_of(config, **changes):
    torch.manual_seed(0)
    config = replace(config, **changes)
    if isinstance(config, ApolloConfig):
        return Apollo(config, markers=3, chromatin=0, crop_px=16).eval()
    return Mvae(config, panel=Panel(("DNA", "P1", "P2"), "DNA"), crop_px=16).eval()


def cells(count=5):
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    shown = torch.tensor([True, False, False]).expand(count, 3)
    return images * shown[..., None, None], shown


def test_the_scale_of_a_linear_decoder_is_the_noise_it_passes_on():
    z = torch.randn(4, 30)
    weights = torch.randn(30)
    noise = fixed_noise(4000, z)
    draw = lambda latent: (latent @ weights)[:, None, None, None]  # noqa: E731
    found = drawn([(draw(z), (draw(z + e) for e in noise))])
    torch.testing.assert_close(found.mean, draw(z))
    torch.testing.assert_close(found.scale.flatten(), weights.norm().expand(4), rtol=0.05, atol=0)


def test_without_draws_there_is_no_scale():
    assert fixed_noise(0, torch.zeros(2, 3)) == []
    for config in (APOLLO, MVAE):
        plain = method_of(config)
        assert not plain.scaled
        assert plain.translate(*cells(), [1]).scale is None


@pytest.mark.parametrize("config", [APOLLO, MVAE], ids=lambda c: c.name)
@torch.inference_mode()
def test_draws_leave_the_mean_and_do_not_depend_on_the_batch(config):
    method, (images, shown) = method_of(config, draws=4), cells()
    assert method.scaled
    found = method.translate(images, shown, [1, 2])
    torch.testing.assert_close(found.mean, method_of(config).translate(images, shown, [1, 2]).mean)
    assert (found.scale > 0).all()
    alone = method.translate(images[2:3], shown[2:3], [2])
    torch.testing.assert_close(alone.scale, found.scale[2:3, 1:], rtol=1e-4, atol=1e-7)


@torch.inference_mode()
def test_more_latent_noise_is_a_wider_scale_of_apollo():
    images, shown = cells()
    scale = {n: method_of(APOLLO, draws=8, latent_noise=n).translate(images, shown, [1]).scale.mean() for n in (0.1, 1)}
    assert scale[1] > 5 * scale[0.1]


@torch.inference_mode()
def test_the_scale_of_mvae_is_the_spread_of_its_posterior():
    """More stains narrow the product of experts, and with it the scale."""
    method = method_of(MVAE, draws=64)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    all_shown = torch.ones(6, 3, dtype=torch.bool)
    one_shown = torch.tensor([True, False, False]).expand(6, 3)
    assert (method.translate(images, all_shown, [1]).scale.mean() <
            method.translate(images, one_shown, [1]).scale.mean())  # fmt: skip
