"""How much of a posterior is in use: closed forms."""

import math

import torch

from imgshared.methods.posterior import signs_of_collapse, spread_of_kl


def test_the_spread_is_that_of_the_dimensions_kl():
    mean = torch.tensor([[2.0, 0.0, 0.0, 0.1, 1.0], [-2.0, 0.0, 0.0, -0.1, 1.0]])
    log_std = torch.tensor([0.0, 0.0, math.log(2), 0.0, 0.0]).expand(2, 5)
    kl = torch.tensor([2.0, 0.0, 0.5 * (4 - 1 - 2 * math.log(2)), 0.005, 0.5])  # (m^2 + s^2 - 1 - log s^2) / 2
    found = spread_of_kl([(mean, log_std)])
    for name, share in (("kl_low", 0.1), ("kl_median", 0.5), ("kl_high", 0.9)):
        torch.testing.assert_close(found[name], kl.quantile(share))
    assert found["active_dimensions"] == 3


def test_a_channel_of_a_map_is_a_dimension_and_levels_are_put_together():
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(4, 3, 8, 8, generator=generator), torch.randn(4, 3, 8, 8, generator=generator)
    coarse = torch.zeros(4, 2, 4, 4), torch.zeros(4, 2, 4, 4)
    rows = [torch.cat([x[:, c].reshape(-1, 1) for c in range(3)], 1) for x in fine]
    flat = spread_of_kl([(torch.cat([rows[0], torch.zeros(256, 2)], 1), torch.cat([rows[1], torch.zeros(256, 2)], 1))])
    found = spread_of_kl([fine, coarse])
    torch.testing.assert_close(found, flat)
    assert found["active_dimensions"] == 3


def test_nothing_is_computed_for_a_gradient():
    mean = torch.ones(2, 3, requires_grad=True)
    assert not any(value.requires_grad for value in spread_of_kl([(mean, mean)]).values())


def test_collapse_is_below_a_twentieth_of_the_dimensions():
    assert signs_of_collapse({"active_dimensions": 2}, 40, "lower beta") == []
    (said,) = signs_of_collapse({"active_dimensions": 1.9}, 40, "lower beta")
    assert said == "hardly any latent dimension carries information (2 of 40): posterior collapse; lower beta"
    values = {"active_dimensions": 40, "protein/active_dimensions": 0}
    assert signs_of_collapse(values, 40, "lower beta", "chromatin") == []  # not watched
    assert "of a protein alone (0 of 40)" in signs_of_collapse(values, 40, "lower beta", "protein")[0]
