import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imgshared.models.resnet import LEVELS, ResnetGenerator


def network(width=4, blocks=3, **changes):
    torch.manual_seed(0)
    return ResnetGenerator(width, blocks, **changes)


def told_apart(net):
    """Give every marker its own modulation."""
    for block in net.blocks:
        nn.init.normal_(block.modulation.weight, 0, 0.1)
        nn.init.normal_(block.modulation.bias, 0, 0.1)
    return net


def outputs_of(module):
    found = []
    module.register_forward_hook(lambda m, i, o: found.append(o))
    return found


def test_layers_are_the_papers():
    net = ResnetGenerator(64, 9)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, *[256] * 18, 128, 64, 1]
    assert [c.kernel_size[0] for c in convolutions] == [7, *[3] * 22, 7]
    assert [c.stride[0] for c in convolutions] == [1, 2, 2, *[1] * 18, 2, 2, 1]
    colour = 2 * 49 * 64 + 2 * 49 * 64 + 2  # of CycleGAN's 11,378,179 parameters: two more channels in and out
    cancelled = 64 + 128 + 256 + 18 * 256 + 128 + 64  # and biases before a norm
    assert sum(p.numel() for p in net.parameters()) == 11_378_179 - colour - cancelled


def test_it_is_what_the_paper_draws():
    net, x = network(), torch.rand(2, 1, 16, 16)

    def norm(h):
        return (h - h.mean((2, 3), keepdim=True)) / (h.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()

    def conv(x, layer, pad):
        return F.conv2d(F.pad(x, (pad,) * 4, mode="reflect"), layer.weight, layer.bias)

    h = norm(conv(x, net.stem, 3)).relu()
    for layer in net.down:
        h = norm(F.conv2d(h, layer.weight, stride=2, padding=1)).relu()
    for block in net.blocks:
        first, second = block.convolutions
        h = h + norm(conv(norm(conv(h, first, 1)).relu(), second, 1))
    for layer in net.up:
        h = norm(F.conv_transpose2d(h, layer.weight, stride=2, padding=1, output_padding=1)).relu()
    torch.testing.assert_close(net(x), conv(h, net.last, 3))


def test_a_condition_scales_and_shifts_the_norms_of_a_block():
    net, x = told_apart(network(markers=3)), torch.rand(2, 16, 6, 6)
    block, condition = net.blocks[0], net.embedding(torch.tensor([0, 2]))
    norm = nn.InstanceNorm2d(16)
    scale_1, shift_1, scale_2, shift_2 = block.modulation(condition).reshape(2, 4, 16, 1, 1).unbind(1)
    first, second = block.convolutions
    h = (norm(first(x)) * (1 + scale_1) + shift_1).relu()
    torch.testing.assert_close(block(x, condition), x + norm(second(h)) * (1 + scale_2) + shift_2)


def test_markers_are_alike_at_the_start_and_can_learn_to_differ():
    net, x, marker = network(markers=3), torch.rand(1, 1, 16, 16).expand(3, -1, -1, -1), torch.arange(3)
    out = net(x, marker)
    torch.testing.assert_close(out[1:], out[:1].expand(2, -1, -1, -1))
    plain = network()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    torch.testing.assert_close(out[:1], plain(x[:1]))  # the modulation does nothing
    out[0].square().sum().backward()
    assert all(block.modulation.weight.grad.any() for block in net.blocks)
    assert not torch.allclose(*told_apart(net)(x, marker)[:2], atol=1e-3)


def test_the_output_is_linear():
    net, x = network(), torch.rand(2, 1, 16, 16)
    out = net(x)
    with torch.no_grad():
        net.last.weight *= 1000
    torch.testing.assert_close(net(x), 1000 * out, rtol=1e-4, atol=1e-4)
    assert net(x).abs().max() > 1


def test_brightness_and_contrast_of_the_tile_are_lost():
    net, x = network(), torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(net(3 * x + 1), net(x), rtol=0, atol=5e-3)
    assert (net(torch.rand(2, 1, 32, 32)) - net(x)).abs().max() > 0.03  # as chance would have it


@pytest.mark.parametrize("side", [8, 16, 17, 30, 33])
def test_any_size(side):
    net, x = network(), torch.rand(2, 1, side, 21)
    assert net(x).shape == x.shape
    top = -side % 4 // 2
    padded = F.pad(x, (1, 2, top, -side % 4 - top), mode="replicate")
    torch.testing.assert_close(net(x), net(padded)[:, :, top : top + side, 1:22])


@pytest.mark.parametrize(("blocks", "middle"), [(1, 0), (2, 0), (6, 2), (9, 4)])
def test_features_are_those_that_cut_compares(blocks, middle):
    net, x = network(blocks=blocks), torch.rand(2, 1, 16, 24)
    hooked = [outputs_of(m) for m in (*net.down, net.blocks[0], net.blocks[middle])]
    deeper = outputs_of(net.blocks[middle + 1]) if blocks > 1 else []
    features = net.features(x, range(LEVELS))
    want = [x, *(h[0] for h in hooked)]
    assert all(torch.equal(a, b) for a, b in zip(features, want, strict=True))
    assert tuple(f.shape[1] for f in features) == net.widths
    assert [tuple(f.shape[2:]) for f in features] == [(16, 24), (8, 12), (4, 6), (4, 6), (4, 6)]
    assert not deeper  # no work beyond the deepest level
    some = net.features(x, (4, 0, 2))
    assert all(torch.equal(some[i], features[level]) for i, level in enumerate((4, 0, 2)))


def test_shallow_levels_need_no_residual_block_and_know_no_marker():
    net, x = told_apart(network(markers=2)), torch.rand(1, 1, 17, 17)
    ran = outputs_of(net.blocks[0])
    net.features(x, (0, 1, 2), torch.tensor([0]))
    assert not ran
    a, b = (net.features(x, range(LEVELS), torch.tensor([m])) for m in (0, 1))
    assert [torch.equal(*pair) for pair in zip(a, b, strict=True)] == [True, True, True, False, False]


def test_a_condition_is_asked_for():
    with pytest.raises(AssertionError, match="needs the markers"):
        network(markers=2)(torch.rand(1, 1, 8, 8))


def test_bf16_predicts_in_float32():
    net, x = network(width=8, markers=2).to(memory_format=torch.channels_last), torch.rand(2, 1, 32, 32)
    marker = torch.tensor([0, 1])
    exact = net(x, marker)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, marker)
    assert out.dtype == torch.float32
    assert len(out.unique()) > 1500  # not the steps of bf16
    assert (out - exact).abs().mean() < 0.02 * exact.std()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
