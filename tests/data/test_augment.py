import numpy as np
import pytest
import torch

from imgshared.build import build_augment
from imgshared.config import ApolloConfig, AugmentConfig
from imgshared.data.augment import Augment, channel_intensity, paired_geometry
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
