import pytest
import torch

from imgshared.models.decoder import LatentDecoder
from imgshared.models.encoder import SplitEncoder
from imgshared.types import InputError


@pytest.mark.parametrize("condition", [0, 4])
@pytest.mark.parametrize("crop_px", [16, 64])
def test_decodes_to_the_size_of_the_crop(crop_px, condition):
    net = LatentDecoder(crop_px, (4, 6, 8), 5, condition_dim=condition)
    logits = net(torch.randn(3, 5), torch.randn(3, condition) if condition else None)
    assert logits.shape == (3, 1, crop_px, crop_px)
    assert logits.min() < 0  # logits, not intensities


def test_it_mirrors_the_encoder():
    channels = (4, 6, 8)
    down = [m for m in SplitEncoder(32, channels, 5, 3, 2).modules() if isinstance(m, torch.nn.Conv2d)]
    up = [m for m in LatentDecoder(32, channels, 5).modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert [(m.out_channels, m.in_channels) for m in down[::-1]] == [(m.in_channels, m.out_channels) for m in up]


def test_every_latent_dimension_and_the_condition_reach_the_image():
    torch.manual_seed(0)
    net = LatentDecoder(16, (4, 8), 5, condition_dim=4).eval()
    latent, condition = torch.randn(1, 5, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    net(latent, condition).square().sum().backward()
    assert (latent.grad != 0).all()
    assert (condition.grad != 0).all()


def test_crops_that_cannot_be_doubled_to_are_refused():
    with pytest.raises(InputError, match="crops of 20 px cannot be halved 3 times"):
        LatentDecoder(20, (4, 6, 8), 5)
