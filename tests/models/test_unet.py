import pytest
import torch
from torch import nn

from imgshared.models.unet import StridedUNet, UNet, check_fits
from imgshared.types import InputError


def settle(net, inputs=1):
    """Give the batch statistics values other than 0 and 1, then evaluate."""
    for _ in range(5):
        net(torch.rand(4, inputs, 32, 32))
    return net.eval()


@pytest.mark.parametrize("net", [UNet(2, 3, (4, 6, 8)), StridedUNet(2, 3, (4, 6, 8))], ids=["unet", "strided"])
@pytest.mark.parametrize("shape", [(16, 16), (17, 30), (3, 5), (1, 1)])
def test_images_of_any_size(net, shape):
    assert net.eval()(torch.rand(2, 2, *shape)).shape == (2, 3, *shape)


@pytest.mark.parametrize(
    ("net", "reach"), [(UNet(1, 1, (4, 6)), 8), (StridedUNet(1, 1, (4, 6)), 14)], ids=["unet", "strided"]
)
def test_a_crop_is_predicted_as_the_interior_of_a_field(net, reach):
    torch.manual_seed(0)
    settle(net)
    field = torch.rand(1, 1, 64, 64)
    crop = net(field[:, :, 8:56, 8:56])  # 8: a multiple of the coarsest pixel
    inside = slice(reach, -reach)
    whole = net(field)[:, :, 8:56, 8:56]
    torch.testing.assert_close(crop[:, :, inside, inside], whole[:, :, inside, inside], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(crop, whole, atol=1e-5)  # the border knows less


def test_odd_sizes_do_not_change_what_is_far_from_the_border():
    net = settle(UNet(1, 1, (4, 6)))
    field = torch.rand(1, 1, 33, 35)
    torch.testing.assert_close(net(field)[:, :, :20, :20], net(field[:, :, :32, :32])[:, :, :20, :20])


@pytest.mark.parametrize("net", [UNet(1, 2, (4, 6)), StridedUNet(1, 2, (4, 6)), StridedUNet(1, 2, (4,))])
def test_half_precision_does_not_round_the_image(net):
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.rand(1, 1, 16, 16))
    assert out.dtype == torch.float32
    assert not torch.equal(out, out.bfloat16().float())


def test_the_unet_is_the_papers():
    net = UNet(1, 2, (64, 128, 256, 512, 1024))
    kernels = [m.kernel_size for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(3, 3)] * 18 + [(1, 1)]  # 23 convolutions with the 4 transposed ones
    assert [m.out_channels for m in net.grow] == [512, 256, 128, 64]
    assert [m[0].in_channels for m in net.up] == [1024, 512, 256, 128]


def test_the_strided_unet_is_pix2pixs():
    """C64-C128-C256-C512-C512-C512-C512-C512 and CD512-CD512-CD512-C512-C256-C128-C64 of the appendix."""
    net = StridedUNet(3, 1, (64, 128, 256, 512, 512, 512, 512, 512))
    down, up = list(net.down), list(net.up)
    assert [d.convolution.out_channels for d in down] == [64, 128, 256, 512, 512, 512, 512, 512]
    assert [u.convolution.out_channels for u in up] == [512, 512, 512, 512, 256, 128, 64, 1]
    assert [u.convolution.in_channels for u in up] == [512, 1024, 1024, 1024, 1024, 512, 256, 128]
    assert [d.norm is not None for d in down] == [False, *[True] * 6, False]
    assert [u.norm is not None for u in up] == [True] * 7 + [False]
    assert [u.dropout for u in up] == [0.5] * 3 + [0.0] * 5
    for block in [*down, *up]:
        assert (block.convolution.kernel_size, block.convolution.stride) == ((4, 4), (2, 2))
    assert up[2].convolution.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_skips_meet_their_own_level():
    """With the innermost paths cut off, the image still passes, by the outermost skip alone."""
    net = StridedUNet(1, 1, (4, 6, 8), dropout=0.0).eval()
    with torch.no_grad():
        net.up[1].convolution.weight.zero_()
        net.up[1].norm.bias.zero_()
    a, b = torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16)
    assert not torch.equal(net(a), net(b))
    with torch.no_grad():
        net.up[2].convolution.weight[:4] = 0  # what comes from the skip
    assert torch.equal(net(a), net(b))


def test_dropout_acts_in_training_alone():
    net = StridedUNet(1, 1, (4, 6, 8))
    x = torch.rand(2, 1, 16, 16)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    still = StridedUNet(1, 1, (4, 6, 8), dropout=0.0)
    assert torch.equal(still(x), still(x))


def test_dropout_spares_the_outermost_level():
    assert [u.dropout for u in StridedUNet(1, 1, (4, 6)).up] == [0.5, 0.0]
    assert [u.dropout for u in StridedUNet(1, 1, (4,)).up] == [0.0]


def test_a_single_small_crop_can_be_trained_on():
    for network in (UNet(1, 1, (4, 6)), StridedUNet(1, 1, (4, 6))):
        out = network(torch.rand(1, 1, 4, 4))
        out.sum().backward()
        assert out.shape == (1, 1, 4, 4)
        assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_crops_too_small_are_refused():
    check_fits(16, 16, (1, 2, 3, 4))
    with pytest.raises(
        InputError, match=r"method.channels: a U-Net of 4 levels needs crops of at least 16 px.* have 15"
    ):
        check_fits(15, 16, (1, 2, 3, 4))
