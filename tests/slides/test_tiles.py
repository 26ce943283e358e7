"""Tiles that fit together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from imgshared.config import CutConfig, LinearConfig, Pix2pixConfig, RegressionConfig, TranslatorConfig
from imgshared.data.windows import plan_tiles
from imgshared.prediction.images import draw_image
from imgshared.slides.tiles import Blended, Exact, reach, step_of

METHODS = (
    TranslatorConfig(channels=(8, 12), marker_dim=4),
    RegressionConfig(channels=(4, 8)),
    Pix2pixConfig(channels=(4, 8), discriminator_channels=(4,)),
    LinearConfig(sigmas=(0, 2, 6)),
)


def test_tiles_cover_every_pixel_once():
    seen = np.zeros((700, 530), int)
    for tile in plan_tiles((700, 530), 256):
        seen[tile] += 1
    assert (seen == 1).all()
    assert len(plan_tiles((700, 530), 256)) == 9


class Looking(torch.nn.Module):
    """A method that sees as far as `radius` pixels."""

    global_statistics = False

    def __init__(self, radius):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 1, 3, padding=radius, dilation=radius)

    def translate(self, images, measured, targets):
        from imgshared.types import Prediction

        return Prediction(self.convolution(images))


@pytest.mark.parametrize(("radius", "margin"), [(1, 16), (5, 16), (64, 64), (65, 80), (100, 112)])
def test_reach_is_the_radius_of_what_is_seen(radius, margin):
    assert reach(Looking(radius), torch.tensor([True, False, False]), [1]) == margin


@pytest.mark.parametrize("config", METHODS, ids=lambda c: c.name)
@pytest.mark.parametrize("side", [256, 512])
def test_tiles_of_any_size_are_parts_of_the_whole_prediction(untrained, config, side):
    run = untrained(config)
    image = np.random.default_rng(0).integers(0, 900, (1, 603, 530)).astype(np.uint16)
    draw = lambda pixels: draw_image(run, pixels, [0], [1, 2])  # noqa: E731
    whole = draw(image)
    margin = reach(run.method, run.source_mask(), [1, 2])
    exact = Exact(draw, image.shape[1:], margin, step_of(run.method))
    for tile in plan_tiles(image.shape[1:], side):
        part = exact(image[:, *exact.outer(tile)], tile)
        np.testing.assert_allclose(part, whole[:, *tile], atol=1e-5 * np.ptp(whole))


def test_too_small_a_margin_would_show(untrained):
    run = untrained(METHODS[0])
    image = np.random.default_rng(0).integers(0, 900, (1, 603, 530)).astype(np.uint16)
    draw = lambda pixels: draw_image(run, pixels, [0], [1, 2])  # noqa: E731
    tile, short = plan_tiles((603, 530), 256)[4], Exact(draw, (603, 530), 0, 16)
    whole = draw(image)
    assert np.abs(short(image[:, *short.outer(tile)], tile) - whole[:, *tile]).max() > 1e-2 * np.ptp(whole)


def test_networks_with_statistics_of_the_image_have_no_reach(untrained):
    run = untrained(CutConfig(width=4, blocks=1, discriminator_channels=(4,)))
    assert reach(run.method, run.source_mask(), [1, 2]) is None


@pytest.mark.parametrize("shape", [(300, 530), (700, 1100), (1200, 513)])
def test_blending_gives_back_what_all_windows_agree_on(shape):
    image = np.random.default_rng(0).random((2, *shape)).astype(np.float32)
    blended = Blended(lambda pixels: pixels, shape)
    for side in (256, 768):
        for tile in plan_tiles(shape, side):
            got = blended(image[:, *blended.outer(tile)], tile)
            np.testing.assert_allclose(got, image[:, *tile], atol=1e-6)


def test_windows_that_disagree_pass_smoothly_into_each_other():
    shape, tile = (512, 1100), (slice(0, 512), slice(0, 1100))
    blended = Blended(lambda pixels: np.full_like(pixels, pixels[0, 0, 0]), shape)
    ramp = np.broadcast_to(np.arange(1100, dtype=np.float32), (1, *shape))
    row = blended(ramp, tile)[0, 200]
    assert np.ptp(row) > 500  # each window says where it begins
    assert np.abs(np.diff(row)).max() < 1.01 * 294 / 128  # two windows lie 294 px apart and share at least 128
    for side in (256, 512):
        parts = [blended(ramp[:, *blended.outer(t)], t)[0] for t in plan_tiles((512, 1100), side)[: -(-1100 // side)]]
        np.testing.assert_allclose(np.concatenate(parts, 1)[200], row, rtol=1e-5)


@pytest.mark.parametrize("part", [(slice(256, 512), slice(512, 768)), (slice(0, 256), slice(900, 1100))])
def test_what_sees_a_part_of_the_image_is_told_exactly(part):
    shape = (700, 1100)
    image, whole = np.zeros((1, *shape), np.float32), (slice(0, 700), slice(0, 1100))
    image[0, *part] = 1
    blended = Blended(lambda pixels: np.full_like(pixels, pixels.any()), shape)  # as instance normalisation sees
    seen = np.zeros(shape, bool)
    seen[blended.reached(part)] = True
    np.testing.assert_array_equal(blended(image, whole)[0] > 0, seen)
    exact = Exact(lambda pixels: ndimage.maximum_filter(pixels, (0, 49, 49)), shape, 24, 16)
    seen = np.zeros(shape, bool)
    seen[exact.reached(part)] = True
    np.testing.assert_array_equal(exact(image, whole)[0] > 0, seen)


def test_a_device_that_never_gives_the_same_twice_has_a_reach():
    torch.manual_seed(0)

    class Trembling(Looking):
        def translate(self, images, measured, targets):
            prediction = super().translate(images, measured, targets)
            return replace(prediction, mean=prediction.mean + 1e-6 * torch.rand_like(prediction.mean))

    sources = torch.tensor([True, False, False])
    assert reach(Trembling(20), sources, [1]) == reach(Looking(20), sources, [1]) == 32


def test_a_smooth_image_has_no_seams(untrained):
    run = untrained(METHODS[0])
    y, x = np.mgrid[:603, :530]
    image = (3000 + 2000 * np.sin(y / 90) * np.cos(x / 110))[None].astype(np.float32)
    draw = lambda pixels: draw_image(run, pixels, [0], [1, 2])  # noqa: E731
    whole, margin = draw(image), reach(run.method, run.source_mask(), [1, 2])
    exact, out = Exact(draw, image.shape[1:], margin, step_of(run.method)), np.zeros_like(draw(image))
    for tile in plan_tiles(image.shape[1:], 256):
        out[:, *tile] = exact(image[:, *exact.outer(tile)], tile)
    steps = np.abs(np.diff(whole, axis=2)).mean()
    assert np.abs(out - whole).max() < 1e-2 * steps  # a seam would be seen beside what changes from pixel to pixel
    short = Exact(draw, image.shape[1:], 0, 16)
    for tile in plan_tiles(image.shape[1:], 256):
        out[:, *tile] = short(image[:, *short.outer(tile)], tile)
    assert np.abs(out - whole).max() > steps
