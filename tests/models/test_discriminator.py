import pytest
import torch
from torch import nn

from imgshared.losses import adversarial_discriminator, r1_penalty
from imgshared.models.discriminator import PatchDiscriminator, check_fits, receptive_field
from imgshared.types import InputError

PUBLISHED = (64, 128, 256, 512)


def critic(inputs=1, channels=(4, 6, 8), **changes):
    torch.manual_seed(0)
    return PatchDiscriminator(inputs, channels, **changes)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize(("side", "map_side"), [(32, 6), (35, 6), (12, 1)])
def test_one_logit_a_patch(norm, side, map_side):
    assert critic(2, norm=norm)(torch.rand(3, 2, side, side)).shape == (3, 1, map_side, map_side)


def test_images_need_not_be_square():
    assert critic(markers=2)(torch.rand(1, 1, 24, 37), torch.tensor([1])).shape == (1, 1, 4, 7)


def test_layers_are_the_papers():
    net = PatchDiscriminator(3, PUBLISHED, norm="batch")
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [*PUBLISHED, 1]
    assert [m.stride[0] for m in convolutions] == [2, 2, 2, 1, 1]
    assert {(m.kernel_size, m.padding) for m in convolutions} == {((4, 4), (1, 1))}
    assert [m.bias is not None for m in convolutions] == [True, False, False, False, True]
    kinds = [type(layer).__name__ for layer in net.features]
    assert kinds == ["Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3]
    cancelled = 128 + 256 + 512  # biases before a norm, which CycleGAN's 2,764,737 parameters count
    assert sum(p.numel() for p in PatchDiscriminator(3, PUBLISHED).parameters()) == 2_764_737 - cancelled
    assert [type(m) for m in critic(norm="none").features] == [nn.Conv2d, nn.LeakyReLU] * 3


def test_weights_start_as_in_pix2pix():
    net = PatchDiscriminator(3, (32, 64, 64), markers=50, norm="batch")
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Embedding):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(m.weight.mean().item()) < 0.002
        elif isinstance(m, nn.BatchNorm2d):
            assert m.weight.mean().item() == pytest.approx(1, abs=0.02)
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            assert (m.bias == 0).all()


@pytest.mark.parametrize(("channels", "side"), [((4, 4, 4, 4), 70), ((4, 4, 4), 34), ((4, 4), 16), ((4,), 7)])
def test_a_logit_sees_its_receptive_field_and_no_more(channels, side):
    assert receptive_field(channels) == side
    net = critic(channels=channels, markers=2, norm="none")  # instance norm would see the whole image
    images = torch.rand(1, 1, 128, 128, requires_grad=True)
    logits = net(images, torch.tensor([1]))
    centre = logits.shape[-1] // 2
    logits[0, 0, centre, centre].backward()
    rows, columns = (images.grad[0, 0] != 0).nonzero().unbind(1)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == side


@pytest.mark.parametrize("channels", [(4,), (4, 4), (4, 4, 4), (4, 4, 4, 4)])
def test_a_patch_larger_than_the_crop_is_refused(channels):
    least = receptive_field(channels)
    check_fits(least, channels)
    assert critic(channels=channels)(torch.rand(1, 1, least, least)).shape[2] > 0
    with pytest.raises(InputError, match=f"{len(channels)} convolutions judge patches of {least} px"):
        check_fits(least - 1, channels)


@pytest.mark.parametrize(("px", "advice"), [(64, "name 3"), (20, "name 2"), (6, "prepare larger crops")])
def test_the_refusal_says_how_many_convolutions_fit(px, advice):
    with pytest.raises(InputError) as refused:
        check_fits(px, PUBLISHED)
    assert str(refused.value) == (
        "method.discriminator_channels: 4 convolutions judge patches of 70 px, larger than the crops of "
        f"{px} px: {advice}"
    )


def test_the_marker_is_projected_on_the_features_at_each_position():
    net = critic(markers=3, norm="none")
    images, marker = torch.rand(2, 1, 24, 24), torch.tensor([2, 0])
    logits = net(images, marker)
    assert not torch.equal(logits, net(images, torch.tensor([1, 0])))
    assert torch.equal(logits[1], net(images, torch.tensor([1, 0]))[1])
    h = net.features(images)
    side = logits.shape[-1]
    expected = net.logit(h).clone()
    for y in range(side):
        for x in range(side):
            centre = h[:, :, y : y + 2, x : x + 2].mean((2, 3))  # the inner 2x2 of the 4x4 that the logit sees
            expected[:, 0, y, x] += (net.embedding(marker) * centre).sum(1)
    torch.testing.assert_close(logits, expected)
    with pytest.raises(AssertionError, match="needs the markers"):
        net(images)


def test_it_learns_that_an_image_is_real_for_one_marker_only():
    net = critic(channels=(8, 8), markers=2, norm="none")
    images = torch.rand(8, 1, 16, 16)
    real, fake = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        loss = adversarial_discriminator(net(images, real), net(images, fake), "hinge")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net(images, real).min() > net(images, fake).max()


def test_r1_reaches_every_weight_that_shapes_the_slope():
    net = critic(markers=2, norm="none")
    images = torch.rand(2, 1, 16, 16, requires_grad=True)
    r1_penalty(net(images, torch.tensor([0, 1])), images).backward()
    assert all((p.grad != 0).any() for p in (*[c.weight for c in net.features[::2]], net.logit.weight))
    assert (net.embedding.weight.grad != 0).any()
