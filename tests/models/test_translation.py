"""The translator's network: which encoder reads what, what is shared, how a stain is drawn, crops against fields."""

import pytest
import torch
from torch import nn

from imgshared.models.bounds import LOG_SCALE
from imgshared.models.pyramid import TimmPyramid
from imgshared.models.translation import LOG_STD, WIDEST, Head, TranslationNetwork, less_wide
from imgshared.types import InputError


def fresh(**changes):
    torch.manual_seed(0)
    settings = {
        "markers": 3, "chromatin": 1, "channels": (4, 6), "shared_fraction": 0.5, "backbone": "conv",
        "by_marker": False, "product": False, "outputs": 1, "marker_dim": 3, "sharp": False,
    }  # fmt: skip
    return TranslationNetwork(**settings | changes).eval()


def build(**changes):
    return randomise(fresh(**changes))


@torch.no_grad()
def randomise(net):
    """Draw every weight, those that start at zero too, so that no path is silent."""
    for parameter in net.parameters():
        parameter.normal_(0, 0.8 / max(parameter[0].numel(), 4) ** 0.5)
    return net


def test_the_share_is_of_every_level_and_leaves_both_sides_a_channel():
    for fraction, widths in ((0.5, [2, 3, 4]), (0.7, [3, 4, 5]), (0.0, [1, 1, 1]), (1.0, [3, 5, 6])):
        net = build(channels=(4, 6, 7), shared_fraction=fraction)
        assert net.widths == widths
        maps = net.encode(torch.rand(2, 1, 16, 16), torch.tensor([0, 1]))
        assert [h.shape[1] for h in maps.shared] == widths
        assert [h.shape[1] for h in maps.specific] == [c - w for c, w in zip((4, 6, 7), widths, strict=True)]
    with pytest.raises(InputError, match=r"method.channels = \[4, 1\]: a level needs two"):
        build(channels=(4, 1))


def test_shared_and_specific_maps_are_the_two_parts_of_a_level():
    net = build(shared_fraction=0.7)
    images, markers = torch.rand(2, 1, 16, 16), torch.tensor([0, 2])
    maps = net.encode(images, markers)
    levels = net.encoders[1](images, net.marker(markers))
    for h, shared, specific in zip(levels, maps.shared, maps.specific, strict=True):
        assert torch.equal(torch.cat([shared, specific], 1), h)


@pytest.mark.parametrize(("by_marker", "networks"), [(False, 2), (True, 3)])
def test_stains_are_encoded_in_any_order_each_by_its_own_encoder(by_marker, networks):
    net = build(by_marker=by_marker, product=True)
    assert len(net.encoders) == networks
    channels = torch.tensor([2, 1, 0, 2, 1, 0, 0])
    images = torch.rand(7, 1, 16, 16)
    together = net.encode(images, channels)
    for i in range(7):
        alone = net.encode(images[i : i + 1], channels[i : i + 1])
        for kind in ("shared", "specific", "log_std"):
            for a, b in zip(getattr(together, kind), getattr(alone, kind), strict=True):
                torch.testing.assert_close(a[i : i + 1], b)
    read = []
    for i, encoder in enumerate(net.encoders):
        encoder.register_forward_hook(lambda module, inputs, out, i=i: read.append((i, len(inputs[0]))))
    net.encode(images, channels)
    assert read == ([(0, 3), (1, 2), (2, 2)] if by_marker else [(0, 2), (1, 5)])


@pytest.mark.parametrize("changes", [{}, {"by_marker": True}, {"backbone": "resnet10t", "channels": (4, 6, 8)}])
def test_all_stains_start_alike(changes):
    net = fresh(**changes)
    side = 4 * net.multiple
    maps = net.encode(torch.rand(1, 1, side, side).expand(3, -1, -1, -1), torch.arange(3))
    for level in (*maps.shared, *maps.specific):
        assert level.std() > 0
        torch.testing.assert_close(level, level[:1].expand_as(level))
    trunk = net.shared_path([h[:1] for h in maps.shared]).expand(3, -1, -1, -1)
    drawn, _ = net.decode(trunk, torch.arange(3), (side, side), detail=torch.zeros(()))
    assert drawn[0].std() > 0
    torch.testing.assert_close(drawn, drawn[:1].expand_as(drawn))
    for one, other in zip(net.encoders[0].parameters(), net.encoders[1].parameters(), strict=False):
        assert one is not other  # alike, not tied


def test_proteins_that_share_an_encoder_are_told_apart_by_their_embedding():
    net = build()
    image = torch.rand(1, 1, 16, 16)
    a, b = (net.encode(image, torch.tensor([c])).shared[0] for c in (0, 2))
    assert not torch.allclose(a, b)
    net.marker.weight.data[2] = net.marker.weight.data[0]
    torch.testing.assert_close(net.encode(image, torch.tensor([2])).shared[0], a)


@pytest.mark.parametrize("backbone", ["conv", "resnet10t"])
def test_only_an_encoder_of_several_markers_is_conditioned_and_the_own_one_from_within(backbone):
    net, image = build(backbone=backbone), torch.rand(1, 1, 16, 16)
    of_chromatin, of_proteins = net.encoders
    assert not any("condition" in name for name, _ in of_chromatin.named_parameters())
    before = of_proteins(image, net.marker.weight[:1])
    of_proteins.conditions[0].linear.bias.data += 1
    after = of_proteins(image, net.marker.weight[:1])
    assert not torch.allclose(before[0], after[0])
    assert torch.allclose(before[1], after[1]) == (backbone != "conv")  # it flows on
    assert not any("condition" in name for name, _ in build(by_marker=True).encoders.named_parameters())


def test_half_precision_does_not_round_the_image():
    net = build()
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = net.decode(torch.randn(1, 4, 4, 4), torch.tensor([0]), (8, 8))
    assert mean.dtype == torch.float32
    assert not torch.equal(mean, mean.bfloat16().float())


def test_experts_start_with_the_spread_of_the_prior_and_are_bounded():
    torch.manual_seed(0)
    fresh = TranslationNetwork(
        markers=2, chromatin=0, channels=(4, 6), shared_fraction=0.5, backbone="conv", by_marker=False, product=True,
        outputs=1, marker_dim=3, sharp=False,
    )  # fmt: skip
    images, channels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    assert not any(s.any() for s in fresh.encode(images, channels).log_std)
    nn.init.constant_(fresh.log_std[0].bias, 99.0)
    nn.init.constant_(fresh.log_std[1].bias, -99.0)
    wide, sharp = fresh.encode(images, channels).log_std
    assert (wide == LOG_STD[1]).all()
    assert (sharp == LOG_STD[0]).all()
    assert not build().encode(images, channels).log_std


def test_each_marker_has_its_own_layer_in_the_head():
    net = build(outputs=2)
    trunk, channels, size = torch.randn(3, 4, 5, 6), torch.tensor([2, 0, 2]), (10, 12)
    mean, log_scale = net.decode(trunk, channels, size)
    for i in range(3):
        alone = net.decode(trunk[i : i + 1], channels[i : i + 1], size)
        torch.testing.assert_close(mean[i : i + 1], alone[0])
        torch.testing.assert_close(log_scale[i : i + 1], alone[1])
    net.head.weight.data[0] += 1
    changed, _ = net.decode(trunk, channels, size)
    assert torch.equal(changed[[0, 2]], mean[[0, 2]])
    assert not torch.allclose(changed[1], mean[1])
    net.head.bias.data[2] += 1
    assert not torch.allclose(net.decode(trunk, channels, size)[0][0], changed[0])


def test_the_scale_is_bounded_and_the_mean_is_not():
    net = build(outputs=2)
    trunk, channel = torch.randn(1, 4, 4, 4), torch.tensor([0])
    for sign, bound in ((1, LOG_SCALE[1]), (-1, LOG_SCALE[0])):
        net.head.last.bias.data.fill_(sign * 99.0)
        mean, log_scale = net.decode(trunk, channel, (8, 8))
        assert (log_scale == bound).all()
        assert (sign * mean > 50).all()
    assert build().decode(trunk, channel, (8, 8))[1] is None


def test_a_fresh_head_draws_no_checkerboard():
    """All pixels of a place start alike: over constant maps the interior is constant."""
    torch.manual_seed(0)
    head = Head(4, 2, 3, 4, 1)
    out = head(torch.randn(1, 4, 1, 1).expand(1, 4, 6, 6), torch.randn(1, 3), torch.tensor([1]))[0, 0]
    inner = out[5:-5, 5:-5]
    assert inner.std() < 1e-6
    assert out.shape == (24, 24)


def test_the_code_of_an_absent_stain_stands_where_its_detail_would():
    net = build()
    trunk, channel = torch.randn(1, 4, 4, 4), torch.tensor([0])
    code = net.absent.weight[0][None, :, None, None].expand(1, 4, 4, 4)
    torch.testing.assert_close(net.decode(trunk, channel, (8, 8), code), net.decode(trunk, channel, (8, 8)))
    detail = net.own_detail(net.encode(torch.rand(1, 1, 8, 8), channel).specific)
    assert detail.shape == trunk.shape
    assert not torch.allclose(net.decode(trunk, channel, (8, 8), detail)[0], net.decode(trunk, channel, (8, 8))[0])


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (5, 23)])
def test_images_of_any_size_come_back_in_their_size(size):
    net = build(channels=(4, 6, 8))
    images, channels = torch.rand(2, 1, *size), torch.tensor([0, 1])
    fused = net.fuse(net.encode(images, channels), channels, torch.arange(2), 2)
    mean, _ = net.decode(net.shared_path(fused.shared), channels, size)
    assert mean.shape == (2, 1, *size)
    padded = nn.functional.pad(images, (0, -size[1] % 8, 0, -size[0] % 8), mode="replicate")
    again = net.fuse(net.encode(padded, channels), channels, torch.arange(2), 2)
    whole, _ = net.decode(net.shared_path(again.shared), channels, padded.shape[2:])
    torch.testing.assert_close(mean, whole[..., : size[0], : size[1]])


def test_in_a_mean_chromatin_counts_most_at_first_and_each_stain_what_it_has_learnt_to():
    net = fresh()
    images, channels, cells = torch.rand(2, 1, 16, 16), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.long)
    maps = net.encode(images, channels)
    for fused, h in zip(net.fuse(maps, channels, cells, 1).shared, maps.shared, strict=True):
        share = ((fused[0] - h[0]) / (h[1] - h[0])).median()
        assert 0.87 < share < 0.93  # about ten times as much as the other
    net.fuse(maps, channels, cells, 1).shared[0].sum().backward()
    assert net.trust.grad[:2].any()
    with torch.no_grad():
        net.trust[0], net.trust[1] = 9.0, -9.0  # far beyond the bounds
    for fused, h in zip(net.fuse(maps, channels, cells, 1).shared, maps.shared, strict=True):
        torch.testing.assert_close(fused[0], h[0], atol=1e-4, rtol=0)


def drawn(net, images):
    """Every stain of each cell from two stains, channels 1 and 2."""
    n, size = len(images), tuple(images.shape[2:])
    cells, channels = torch.arange(n).repeat_interleave(2), torch.tensor([1, 2]).repeat(n)
    maps = net.encode(images[cells, channels, None], channels)
    trunk = net.shared_path(net.fuse(maps, channels, cells, n).shared)
    own = net.own_detail([h[1::2] for h in maps.specific])
    out = [*net.decode(trunk, torch.zeros(n, dtype=torch.long), size), *net.decode(trunk, channels[1::2], size, own)]
    return torch.cat([x for x in out if x is not None], 1)


@pytest.mark.parametrize("product", [False, True])
@torch.no_grad()
def test_a_crop_and_the_field_around_it_agree_beyond_the_receptive_field(product):
    """What a patch becomes must not depend on how much of the slide is shown around it: no statistics of the image."""
    net = build(product=product, outputs=2)
    field = torch.rand(1, 3, 153, 170)
    edge, at = 36, 40  # 2 + 2 convolutions at 1/4, 3 + 3 at 1/2, one at 1, and what the grid cuts: 32 px
    whole = drawn(net, field)
    crop = drawn(net, field[..., at : at + 96, at + 8 : at + 104])
    inner = whole[..., at + edge : at + 96 - edge, at + 8 + edge : at + 104 - edge]
    assert inner.std() > 0.05  # not a constant that agrees for free
    torch.testing.assert_close(crop[..., edge:-edge, edge:-edge], inner, atol=1e-4, rtol=0)
    assert not torch.allclose(crop[..., :4, :4], whole[..., at : at + 4, at + 8 : at + 12], atol=1e-2)  # edges differ


def test_a_sharp_image_starts_as_the_mean_and_teaches_texture_alone():
    torch.manual_seed(0)
    net = TranslationNetwork(
        markers=3, chromatin=1, channels=(4, 6), shared_fraction=0.5, backbone="conv", by_marker=False, product=False,
        outputs=1, marker_dim=3, sharp=True,
    ).eval()  # fmt: skip
    shared = [torch.randn(2, width, side, side, requires_grad=True) for width, side in ((2, 16), (3, 8))]
    channels = torch.tensor([0, 2])
    mean, _ = net.decode(net.shared_path(shared), channels, (31, 32))
    assert torch.equal(net.sharpen(mean, net.texture_trunk(shared), channels), mean)
    randomise(net.texture)
    net.sharpen(mean, net.texture_trunk(shared), channels).square().sum().backward()
    moved = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"texture"}
    assert all(h.grad is None for h in shared)


def test_texture_is_what_is_fine_and_has_no_say_over_brightness():
    x = torch.arange(96.0)
    waves = {period: torch.sin(2 * torch.pi * x / period).expand(1, 1, 96, 96) for period in (6, 96)}
    flat = torch.ones(1, 1, 96, 96)
    kept = {p: float(less_wide(w).square().mean() / w.square().mean()) for p, w in waves.items()}
    assert kept[6] > 0.97
    assert kept[96] < 0.1
    torch.testing.assert_close(less_wide(flat), 0 * flat, atol=1e-5, rtol=0)
    kernel = 1 - less_wide(torch.eye(99)[49].expand(1, 1, 99, 99).clone())[0, 0, 49]  # beyond it nothing is looked at
    assert kernel[49 - 2 * (WIDEST // 2) : 50 + 2 * (WIDEST // 2)].ne(1).all()
    assert kernel[: 49 - 2 * (WIDEST // 2)].eq(1).all()

    torch.manual_seed(0)
    net = build(sharp=True)
    mean = torch.rand(2, 1, 64, 64)
    trunk = net.texture_trunk([torch.randn(2, width, side, side) for width, side in ((2, 32), (3, 16))])
    texture = (
        net.texture(trunk, net.marker(torch.tensor([0, 2])), torch.tensor([0, 2])) + 1.0
    )  # brightness is asked for
    added = net.sharpen(mean, trunk, torch.tensor([0, 2])) - mean
    assert added.std() > 0.5 * texture.std()
    assert added.mean((1, 2, 3)).abs().max() < 0.05 * added.std()


def test_a_timm_backbone_serves_crops_and_fields_of_odd_sizes():
    net = build(backbone="resnet10t", channels=(4, 6, 8), by_marker=True)
    assert all(isinstance(encoder, TimmPyramid) for encoder in net.encoders)
    assert net.multiple == 8
    for size in ((33, 47), (64, 64)):
        assert drawn(net, torch.rand(2, 3, *size)).shape == (2, 2, *size)
