"""Pyramids, the way back up, padding and pooling."""

import numpy as np
import pytest
import torch
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


def test_pooling_weighs_the_middle_by_a_gaussian_of_a_quarter_of_the_side():
    rng = np.random.default_rng(0)
    fine, coarse = rng.random((2, 3, 9, 17)), rng.random((2, 4, 1, 2))
    expected = []
    for h in (fine, coarse):
        weights = np.zeros(h.shape[2:])
        for y in range(h.shape[2]):
            for x in range(h.shape[3]):
                at = [-2 + 4 * i / (n - 1) if n > 1 else 0 for i, n in ((y, h.shape[2]), (x, h.shape[3]))]
                weights[y, x] = np.exp(-0.5 * (at[0] ** 2 + at[1] ** 2))
        expected.append((h * weights).sum((2, 3)) / weights.sum())
    pooled = pool_to_middle([torch.from_numpy(h).float() for h in (fine, coarse)])
    np.testing.assert_allclose(pooled.numpy(), np.hstack(expected), rtol=1e-5)
    torch.testing.assert_close(pool_to_middle([torch.full((1, 2, 5, 5), 3.0)]), torch.full((1, 2), 3.0))


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


def test_a_name_of_timm_may_carry_the_tag_of_its_weights():
    assert TimmPyramid("resnet18.a1_in1k", (4, 6)).reductions == (2, 4)


@pytest.mark.parametrize(
    ("name", "levels", "said"),
    [
        ("resnet10tt", 2, r"timm knows no model 'resnet10tt'. Did you mean 'resnet10t'\?"),
        ("qqqqqqqqqq", 2, "timm knows no model 'qqqqqqqqqq'.$"),
        ("resnet10t", 6, "method.channels has 6 levels, more than resnet10t: name fewer"),
        ("xcit_nano_12_p8_224", 13, "method.channels has 13 levels, more than xcit_nano_12_p8_224: name fewer"),
        (
            "vit_tiny_patch16_224",
            2,
            "vit_tiny_patch16_224 takes images of its own size alone: name a convolutional one",
        ),
        ("levit_128", 2, "levit_128 takes images of its own size alone"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_by_name(name, levels, said):
    with pytest.raises(InputError, match=said):
        TimmPyramid(name, (4,) * levels)
