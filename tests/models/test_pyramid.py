"""Pyramids, the way back up, padding and pooling."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from imgshared.models.pyramid import (
    Block,
    Condition,
    ConvPyramid,
    TimmPyramid,
    UpPath,
    pad_to_multiple,
    pool_to_middle,
)
from imgshared.types import InputError


def test_each_level_halves_the_last():
    torch.manual_seed(0)
    net = ConvPyramid((4, 6, 8), inputs=2)
    maps = net(torch.rand(3, 2, 16, 24))
    assert net.reductions == (2, 4, 8)
    assert [tuple(h.shape) for h in maps] == [(3, 4, 8, 12), (3, 6, 4, 6), (3, 8, 2, 3)]


def test_no_image_sees_the_others_of_its_batch():
    torch.manual_seed(0)
    net, images = ConvPyramid((4, 6)), torch.rand(3, 1, 8, 8)
    net(torch.rand(9, 1, 8, 8))  # takes up statistics,
    net.eval()  # which are constants from now on
    together = net(images)
    for i in range(3):
        for whole, alone in zip(together, net(images[i : i + 1]), strict=True):
            torch.testing.assert_close(whole[i : i + 1], alone)


def test_a_block_starts_near_the_identity_and_a_condition_at_it():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 6)
    block = Block(5)
    assert 0 < (block(x) - x - block.last.bias[:, None, None]).abs().max() < 0.02
    condition, code = Condition(3, 5), torch.randn(2, 3)
    assert torch.equal(condition(x, code), x)
    nn.init.normal_(condition.linear.weight)
    scale, shift = condition.linear(code).chunk(2, 1)
    for i in range(2):
        for c in range(5):
            torch.testing.assert_close(condition(x, code)[i, c], x[i, c] * (1 + scale[i, c]) + shift[i, c])


def test_the_way_up_ends_at_the_finest_level_and_hears_all():
    torch.manual_seed(0)
    maps = [torch.randn(2, c, s, s, requires_grad=True) for c, s in ((3, 16), (4, 8), (5, 2))]
    out = UpPath((3, 4, 5), (6, 7, 8), (2, 4, 16)).eval()(maps)  # steps need not be of 2
    assert out.shape == (2, 6, 16, 16)
    out[0].sum().backward()
    for h in maps:
        assert h.grad[0].any()
        assert not h.grad[1].any()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 16), (19, 30), (3, 50)])
def test_padding_repeats_the_last_row_and_column(height, width):
    images = torch.rand(2, 3, height, width)
    padded = pad_to_multiple(images, 8)
    assert padded.shape[2] % 8 == padded.shape[3] % 8 == 0
    assert padded.shape[2] - height < 8
    assert padded.shape[3] - width < 8
    expected = np.pad(images.numpy(), [(0, 0), (0, 0), (0, -height % 8), (0, -width % 8)], mode="edge")
    np.testing.assert_array_equal(padded.numpy(), expected)
    assert (padded is images) == (height % 8 == width % 8 == 0)


def test_pooling_weighs_the_middle_of_the_image_by_a_gaussian_of_a_quarter_of_its_side():
    rng = np.random.default_rng(0)
    height, width = 9, 31  # padded to 12 and 32
    fine, coarse = rng.random((2, 3, 6, 16)), rng.random((2, 4, 3, 8))
    expected = []
    for h, r in ((fine, 2), (coarse, 4)):
        weights = np.zeros(h.shape[2:])
        for y, x in np.ndindex(weights.shape):  # in pixels from the middle
            dy, dx = (y + 0.5) * r - height / 2, (x + 0.5) * r - width / 2
            weights[y, x] = np.exp(-0.5 * ((dy / (height / 4)) ** 2 + (dx / (width / 4)) ** 2))
        expected.append((h * weights).sum((2, 3)) / weights.sum())
    pooled = pool_to_middle([torch.from_numpy(h).float() for h in (fine, coarse)], (2, 4), (height, width))
    np.testing.assert_allclose(pooled.numpy(), np.hstack(expected), rtol=1e-5)
    flat = pool_to_middle([torch.full((1, 2, 1, 1), 3.0)], (64,), (4, 4))  # far smaller than what it is padded to
    torch.testing.assert_close(flat, torch.full((1, 2), 3.0))


@pytest.mark.parametrize("side", [17, 20, 24, 33, 40, 64])
def test_what_is_pooled_is_in_the_crop(side):
    padded = -(-side // 16) * 16
    inside = (torch.arange(padded) < side).float()
    image = (inside[:, None] * inside)[None, None]
    levels = [F.avg_pool2d(image, r) for r in (2, 4, 8, 16)]
    assert pool_to_middle(levels, (2, 4, 8, 16), (side, side)).min() > 0.85


def test_a_timm_backbone_gives_the_widths_asked_for():
    torch.manual_seed(0)
    net = TimmPyramid("resnet10t", (4, 6, 8))
    assert net.reductions == (2, 4, 8)
    assert net.training
    assert all(m.training for m in net.modules())  # the look at its maps left no trace
    maps = net(torch.rand(2, 1, 32, 40))
    assert [tuple(h.shape) for h in maps] == [(2, 4, 16, 20), (2, 6, 8, 10), (2, 8, 4, 5)]
    sum(h.square().sum() for h in maps).backward()
    assert all(p.grad is not None for p in net.parameters())  # no layer beyond the last level is carried along


def test_what_a_backbone_runs_behind_the_last_level_is_dropped():
    name, image = "mobilenetv3_small_050", torch.rand(2, 1, 32, 40)
    torch.manual_seed(0)
    net = TimmPyramid(name, (4, 6, 8))
    torch.manual_seed(0)
    whole = timm.create_model(name, pretrained=False, features_only=True, in_chans=1, out_indices=(0, 1, 2)).eval()
    for ours, theirs in zip(net.eval().body(image), whole(image), strict=True):
        assert torch.equal(ours, theirs)
    assert all(p.grad is None for p in net.parameters())
    sum(h.square().sum() for h in net.train()(image)).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_backbone_can_be_made_where_no_gradients_are(mode):
    with mode():
        net = TimmPyramid("mobilenetv3_small_050", (4, 6))
    assert all(p.requires_grad for p in net.body.parameters())
    assert not any(isinstance(m, nn.Identity) and list(m.children()) for m in net.modules())


def test_pyramids_take_images_of_any_number_of_channels():
    image = torch.rand(2, 3, 32, 40)
    for net in (ConvPyramid((4, 6), inputs=3), TimmPyramid("resnet10t", (4, 6), inputs=3)):
        assert [tuple(h.shape) for h in net(image)] == [(2, 4, 16, 20), (2, 6, 8, 10)]


def test_crops_that_leave_one_pixel_to_normalise_over_are_refused():
    TimmPyramid("resnet10t", (4, 6, 8)).check_fits(16)
    squeezing = TimmPyramid("skresnet18", (4, 6))
    with pytest.raises(InputError, match=r"method.backbone: skresnet18 cannot learn from a single 32 px crop"):
        squeezing.check_fits(32)
    assert squeezing.training


@pytest.mark.parametrize(
    ("name", "levels", "said"),
    [
        ("resnet10tt", 2, r"timm knows no model 'resnet10tt'. Did you mean 'resnet10t'\?"),
        ("resnet18.a1_in1k", 2, "'resnet18.a1_in1k' names pretrained weights, .* from the start here: name 'resnet18'"),
        ("qqqqqqqqqq", 2, "timm knows no model 'qqqqqqqqqq'.$"),
        ("resnet10t", 6, "method.channels has 6 levels, more than resnet10t: name fewer"),
        ("xcit_nano_12_p8_224", 13, "method.channels has 13 levels, more than xcit_nano_12_p8_224: name fewer"),
        (
            "vit_tiny_patch16_224",
            2,
            "vit_tiny_patch16_224 does not take images of 64 x 64 px .*: name a convolutional one",
        ),
        ("levit_128", 2, "levit_128 does not take images of 128 x 128 px"),
        ("hrnet_w18_small", 3, "hrnet_w18_small does not take images of 24 x 40 px"),
        ("inception_v3", 3, r"inception_v3 makes maps of .* of an image of 32 x 32 px, not of it over \(2, 4, 8\)"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_by_name(name, levels, said):
    with pytest.raises(InputError, match=said):
        TimmPyramid(name, (4,) * levels)
