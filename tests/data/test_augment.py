import numpy as np
import pytest
import torch

from imgshared.build import build_augment
from imgshared.config import ApolloConfig, AugmentConfig
from imgshared.data.augment import Augment, channel_intensity, paired_geometry, warp_as_batch, warp_on_host
from imgshared.types import Batch, InputError

ALL = {"flips": True, "rotate_deg": 30.0, "scale": 0.2, "shift": 0.1}
OFF = dict.fromkeys(ALL, 0)


def crops(channels, dtype, n=6, px=20):
    one = np.random.default_rng(0).integers(0, 250, (n, 1, px, px))
    return torch.from_numpy(np.repeat(one, channels, 1).astype(dtype))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 7, 36])
def test_all_channels_of_a_cell_move_alike(channels, dtype):
    raw = crops(channels, dtype)
    warped = paired_geometry(**ALL)(raw, 3)
    assert (warped.shape, warped.dtype) == (raw.shape, raw.dtype)
    assert not torch.equal(warped, raw)
    for c in range(1, channels):
        difference = (warped[:, c].float() - warped[:, 0].float()).abs().max()
        assert difference <= (1e-3 if dtype == np.float32 else 1)  # OpenCV rounds groups of 4 channels on their own


def test_geometry_is_a_function_of_the_seed_and_differs_by_cell():
    raw = crops(2, np.uint16)
    raw[:] = raw[:1].clone()
    warp = paired_geometry(**ALL)
    assert torch.equal(warp(raw, 7), paired_geometry(**ALL)(raw, 7))
    assert not torch.equal(warp(raw, 7), warp(raw, 8))
    assert not torch.equal(warp(raw, 7)[0], warp(raw, 7)[1])


WARPS = pytest.mark.parametrize("warp", [warp_on_host, warp_as_batch], ids=["albumentations", "kornia"])


def blobs(x, y, n=60, px=65, width=3.0):
    """(n, 2, px, px) float32: a Gaussian blob off the centre by (x, y), on an offset of 100, twice."""
    yy, xx = np.mgrid[:px, :px] - (px - 1) / 2
    blob = 100 + 1000 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * width**2))
    return torch.from_numpy(np.tile(blob.astype(np.float32), (n, 2, 1, 1)))


def moments(warped):
    """Centre (n, 2), as x and y from the middle, and width (n,) of each blob."""
    mass = (warped[:, 0] - 100).clamp_min(0).double()
    mass /= mass.sum((1, 2), keepdim=True)
    at = torch.arange(warped.shape[-1]) - (warped.shape[-1] - 1) / 2
    x, y = (mass.sum(1) * at).sum(1), (mass.sum(2) * at).sum(1)
    spread = (mass.sum(1) * at**2).sum(1) - x**2 + (mass.sum(2) * at**2).sum(1) - y**2
    return torch.stack([x, y], 1), (spread / 2).sqrt()


@WARPS
def test_shifts_are_uniform_within_their_part_of_the_crop(warp):
    centre, width = moments(warp(0, 0, 0.1)(blobs(0, 0, n=300), 1))
    assert centre.abs().max() <= 6.5 + 1
    assert centre.std(0).numpy() == pytest.approx(6.5 / 3**0.5, rel=0.15)  # albumentations cuts them to whole pixels
    assert centre.mean(0).abs().max() < 0.8
    assert abs(np.corrcoef(centre.T)[0, 1]) < 0.2
    assert width.numpy() == pytest.approx(3, rel=0.05)


@WARPS
def test_scales_are_uniform_about_the_middle(warp):
    centre, width = moments(warp(0, 0.25, 0)(blobs(0, 0, n=300), 1))
    factor = width / 3  # the same along both axes: a round cell stays round
    assert factor.min() > 0.72
    assert factor.max() < 1.29
    assert factor.std() == pytest.approx(0.25 / 3**0.5, rel=0.12)
    assert centre.abs().max() < 0.6


@WARPS
def test_turns_are_uniform_about_the_middle(warp):
    centre, _ = moments(warp(40, 0, 0)(blobs(15, 0, n=300), 1))
    angle = np.degrees(np.arctan2(*centre.numpy().T[::-1]))
    assert np.abs(angle).max() <= 41
    assert angle.std() == pytest.approx(40 / 3**0.5, rel=0.12)
    assert abs(angle.mean()) < 4
    assert centre.norm(dim=1).numpy() == pytest.approx(15, abs=0.6)


@WARPS
def test_beyond_the_border_its_pixels_go_on(warp):
    flat = torch.full((40, 1, 16, 16), 137.0)
    assert warp(45, 0.3, 0.2)(flat, 0).numpy() == pytest.approx(137.0, abs=1e-3)


def test_crops_on_a_gpu_are_warped_as_a_batch_and_alike_in_all_channels():
    raw = crops(5, np.uint16)
    warp = warp_as_batch(30.0, 0.2, 0.1)
    warped = warp(raw.to(torch.int32), 3)
    assert warped.dtype == torch.float32
    assert torch.equal(warped, warp(raw.to(torch.int32), 3))
    assert not torch.equal(warped, warp(raw.to(torch.int32), 4))
    for c in range(1, 5):
        torch.testing.assert_close(warped[:, c], warped[:, 0])
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    warp(raw.to(torch.int32), 3)
    assert torch.equal(torch.rand(3), expected)


def test_flips_move_pixels_and_change_none():
    raw = crops(2, np.uint16)
    flipped = paired_geometry(**OFF | {"flips": True})(raw, 1)
    assert torch.equal(flipped.int().flatten(2).sort().values, raw.int().flatten(2).sort().values)


def test_all_off_is_none():
    assert paired_geometry(**OFF) is None
    assert channel_intensity(gain=0, noise=0) is None
    assert build_augment(AugmentConfig(), ApolloConfig()) == Augment(None, None)


def batch(value, n=4, channels=3):
    measured = torch.ones(n, channels, dtype=torch.bool)
    measured[::2, -1] = False
    images = torch.full((n, channels, 8, 8), value) * measured[..., None, None]
    return Batch(torch.arange(n), images, measured)


def test_gain_differs_by_channel_and_does_not_clip():
    augment = Augment(None, channel_intensity(gain=0.5, noise=0.0))
    for value in (1.5, -0.5):
        given = batch(value)
        out = augment.intensity(given, 0)
        factors = (out.images / value).mean((2, 3))[given.measured]
        assert len(factors.unique()) == len(factors)
        assert ((factors >= 0.5) & (factors <= 1.5)).all()
        assert (out.images[~given.measured] == 0).all()
        assert torch.equal(out.index, given.index)
    assert augment.intensity(batch(1.5), 0).images.max() > 1.6


def test_noise_has_its_standard_deviation_on_both_sides_and_leaves_unmeasured_alone():
    given = batch(0.0, n=200)
    out = Augment(None, channel_intensity(gain=0.0, noise=0.3)).intensity(given, 0)
    noise = out.images[given.measured]
    assert abs(noise.std() - 0.3) < 0.01
    assert abs(noise.mean()) < 0.01
    assert (out.images[~given.measured] == 0).all()


def test_intensity_is_a_function_of_the_seed_and_leaves_torchs_generator_alone():
    augment = Augment(None, channel_intensity(gain=0.5, noise=0.1))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = augment.intensity(batch(0.5), 11).images
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, augment.intensity(batch(0.5), 11).images)
    assert not torch.equal(first, augment.intensity(batch(0.5), 12).images)


@pytest.mark.parametrize("key", ["flips", "rotate_deg", "scale", "shift"])
def test_geometry_is_refused_for_free_latents(key):
    config = AugmentConfig(**{key: 0.5 if key != "flips" else True})
    with pytest.raises(InputError, match="flips, rotate_deg, scale and shift must stay off"):
        build_augment(config, ApolloConfig())
    assert build_augment(config, ApolloConfig(one_step=True)).geometry is not None
    assert build_augment(AugmentConfig(noise=0.1), ApolloConfig()).change is not None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_all_eight_mirror_images_and_turns_occur_and_nothing_else(dtype):
    one = torch.arange(9).reshape(1, 1, 3, 3).to(torch.int64)
    square = {tuple(np.rot90(f, k).ravel()) for f in (one[0, 0].numpy(), one[0, 0].numpy().T) for k in range(4)}
    raw = torch.from_numpy(np.repeat(one.numpy(), 400, 0).astype(dtype))
    turned = paired_geometry(**OFF | {"flips": True})(raw, 5)
    assert turned.dtype == raw.dtype
    seen = [tuple(crop.ravel()) for crop in turned.to(torch.int64).numpy()[:, 0]]
    assert set(seen) == square
    assert min(seen.count(s) for s in square) > 25  # of 50 expected
