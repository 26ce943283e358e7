"""An ensemble against the moments of a mixture."""

import pytest
import torch

from imgshared.build import build_method
from imgshared.config import RegressionConfig, TranslatorConfig
from imgshared.data.panel import Panel
from imgshared.methods.ensemble import Ensemble

PANEL = Panel(("DNA", "P1", "P2"), "DNA")
SOURCE = torch.tensor([True, False, False])


def members(config, count=3):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(build_method(config, PANEL, 16).eval())
    return made


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * SOURCE[:, None, None]


@pytest.mark.parametrize("error", ["l2", "gaussian"])
@torch.inference_mode()
def test_mean_and_scale_are_those_of_draws_from_the_members(error, images):
    each = members(RegressionConfig(channels=(4, 8), error=error))
    found = Ensemble(each).translate(images, SOURCE.expand(2, 3), [1, 2])
    drawn = [m.translate(images, SOURCE.expand(2, 3), [1, 2]) for m in each]
    noise = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0))
    pixel = torch.stack([p.mean[1, 0, 3, 4] for p in drawn])
    width = torch.stack([torch.tensor(0.0) if p.scale is None else p.scale[1, 0, 3, 4] for p in drawn])
    mixture = (pixel[:, None] + width[:, None] * noise).flatten()
    assert found.mean[1, 0, 3, 4].item() == pytest.approx(pixel.mean().item(), abs=1e-6)
    assert found.scale[1, 0, 3, 4].item() == pytest.approx(mixture.std(correction=0).item(), rel=0.01)


@torch.inference_mode()
def test_equal_members_are_sure(images):
    one = members(TranslatorConfig(channels=(8, 12), marker_dim=4), 1)[0]
    both = Ensemble([one, one])
    found = both.translate(images, SOURCE.expand(2, 3), [1])
    torch.testing.assert_close(found.mean, one.translate(images, SOURCE.expand(2, 3), [1]).mean)
    assert found.scale.max() < 1e-4
    assert both.any_size
    assert both.scaled
    assert not both.sharp


def test_it_is_bound_as_its_members_are_and_not_trained(images):
    both = Ensemble(members(RegressionConfig(channels=(4, 8)), 2))
    assert both.sources == (0,)
    assert both.targets == (1, 2)
    assert not both.stages
    with pytest.raises(TypeError, match="one by one"):
        both.loss(None, "generator")
    with pytest.raises(TypeError, match="one by one"):
        both.validate(None)
