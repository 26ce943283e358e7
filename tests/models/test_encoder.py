import pytest
import torch

from imgshared.models.encoder import SplitEncoder, final_side
from imgshared.types import InputError


def encoder(**changes):
    torch.manual_seed(0)
    sizes = {"crop_px": 32, "channels": (6, 8, 10), "shared_channels": 7, "shared_dim": 5, "specific_dim": 3}
    return SplitEncoder(**sizes | changes)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("condition", [0, 4])
def test_shapes(outputs, condition):
    images = torch.rand(2, 1, 32, 32)
    given = torch.rand(2, condition) if condition else None
    z_s, z_m = encoder(outputs=outputs, condition_dim=condition)(images, given)
    assert (z_s.shape, z_m.shape) == ((2, outputs * 5), (2, outputs * 3))


def test_without_a_specific_latent_nothing_is_specific():
    net = encoder(specific_dim=0)
    assert net(torch.rand(2, 1, 32, 32))[1].shape == (2, 0)
    assert net.specific_head is None


def test_the_heads_see_disjoint_channels_of_the_last_map():
    net = encoder()
    seen = []

    def keep(_, __, h):
        h.retain_grad()
        seen.append(h)

    net.features.register_forward_hook(keep)
    for head, own in ((0, slice(None, 7)), (1, slice(7, None))):
        net(torch.rand(2, 1, 32, 32))[head].sum().backward()
        grad = seen[-1].grad.abs().sum((0, 2, 3))
        other = torch.ones(10, dtype=torch.bool)
        other[own] = False
        assert (grad[own] > 0).all()
        assert (grad[other] == 0).all()


def test_shared_output_does_not_change_with_the_last_channels():
    net = encoder().eval()
    images = torch.rand(2, 1, 32, 32)
    before = net(images)
    with torch.no_grad():
        net.features[-2].weight[7:] += 1  # BatchNorm gains of the channels that feed the specific head
    after = net(images)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_the_condition_reaches_both_heads():
    net = encoder(condition_dim=4).eval()
    images = torch.rand(2, 1, 32, 32)
    for a, b in zip(net(images, torch.zeros(2, 4)), net(images, torch.ones(2, 4)), strict=True):
        assert not torch.equal(a, b)


def test_layers_are_the_papers():
    net = encoder()
    kinds = [type(layer).__name__ for layer in net.features]
    assert kinds == ["Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2]
    first = net.features[0]
    assert (first.kernel_size, first.stride, first.padding, first.bias) == ((4, 4), (2, 2), (1, 1), None)


@pytest.mark.parametrize("shared_channels", [0, 10, 11])
def test_a_split_that_leaves_a_head_without_channels_is_refused(shared_channels):
    with pytest.raises(InputError, match=f"shared_channels = {shared_channels} must lie between 1 and 9"):
        encoder(shared_channels=shared_channels)


@pytest.mark.parametrize(("crop_px", "hint"), [(36, ": use 2, or prepare"), (31, ", or prepare"), (8, ": use 2, or")])
def test_crops_that_cannot_be_halved_are_refused(crop_px, hint):
    with pytest.raises(InputError, match=f"crops of {crop_px} px cannot be halved 3 times.*method.channels.*{hint}"):
        encoder(crop_px=crop_px)


def test_final_side():
    assert final_side(128, (64, 128, 256, 256, 96)) == 4
    assert final_side(8, (1, 1)) == 2
