"""Features see what they should, and nothing of the nucleus's shape unless asked."""

import numpy as np
from scipy.ndimage import gaussian_filter

from imgshared.data.features import (
    EXTENT_NAMES,
    SHAPE,
    STAIN_NAMES,
    blur,
    central_frame,
    extent_features,
    frame,
    shape_features,
    stain_features,
    typical_radius,
)


def disc(radius, side=48):
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5
    return np.hypot(x, y) < radius


def test_names_match_columns_and_all_is_finite():
    masks = np.stack([disc(10), np.zeros((48, 48), bool), np.ones((48, 48), bool)])
    images = np.stack([np.zeros((48, 48)), np.random.default_rng(0).random((48, 48)), np.full((48, 48), np.nan)])
    found = stain_features(images, frame(masks))
    assert found.shape == (3, len(STAIN_NAMES))
    assert np.isfinite(found).all()
    assert shape_features(masks).shape == (3, len(SHAPE))


def test_one_frame_for_all_cells_tells_nothing_of_their_outlines():
    masks = np.stack([disc(radius) for radius in (6, 9, 10, 11, 15)])
    picture = np.broadcast_to(gaussian_filter(disc(10).astype(np.float32), 2), masks.shape)
    own, central = (stain_features(picture, f) for f in (frame(masks), central_frame(5, 48, typical_radius(masks))))
    assert np.ptp(own, axis=0).max() > 0.1  # the same picture, and yet the outline shows
    assert np.ptp(central, axis=0).max() == 0
    assert np.allclose(central[2], own[2], rtol=1e-5, atol=1e-6)  # where the outline is the typical one


def test_typical_radius_leaves_empty_masks_out():
    empty = np.zeros((48, 48), bool)
    assert np.isclose(typical_radius(np.stack([disc(8), disc(10), disc(12), empty, empty, empty])), 10, atol=0.1)
    assert typical_radius(empty[None]) == 12


def test_means_inside_and_outside_are_exact():
    masks = disc(10)[None]
    image = np.where(masks, 0.8, 0.2).astype(np.float32)
    found = dict(zip(STAIN_NAMES, stain_features(image, frame(masks))[0], strict=True))
    assert np.isclose(found["mean_inside"], 0.8)
    assert np.isclose(found["mean_outside"], 0.2)
    assert np.isclose(found["log_ratio"], np.log(0.82 / 0.22))
    assert np.isclose(found["ring0"], 0.8)
    assert np.isclose(found["ring8"], 0.2)


def test_spots_are_counted():
    image = np.random.default_rng(0).normal(0.2, 0.01, (1, 48, 48)).astype(np.float32)
    for y, x in ((20, 20), (28, 26), (22, 29)):
        image[0] += 2 * gaussian_filter((np.mgrid[:48, :48] == np.array([y, x])[:, None, None]).all(0) * 1.0, 1.2)
    found = dict(zip(STAIN_NAMES, stain_features(image, frame(disc(14)[None]))[0], strict=True))
    assert round(found["spot_count_inside"] ** 2) == 3


def test_each_cell_is_described_by_itself():
    masks = np.stack([disc(8), disc(14)])
    images = np.random.default_rng(0).random((2, 48, 48)).astype(np.float32)
    together = stain_features(images, frame(masks))
    alone = np.vstack([stain_features(images[i : i + 1], frame(masks[i : i + 1])) for i in range(2)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shape_features(masks)[:, 0], masks.sum((1, 2)))


def test_blur_matches_scipy():
    image = np.random.default_rng(0).random((2, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(blur(image, 3), gaussian_filter(image, (0, 3, 3), mode="reflect"), atol=1e-5)


def extent(images, masks):
    found = extent_features(images.astype(np.float32), frame(masks))
    return [dict(zip(EXTENT_NAMES, row, strict=True)) for row in found.tolist()]


def test_extent_of_known_shapes():
    y, x = np.mgrid[:48, :48] - 23.5
    ellipse = (x / 16) ** 2 + (y / 8) ** 2 < 1
    moved = np.hypot(x - 6, y - 8) < 8
    round_, long, aside = extent(np.stack([disc(10), ellipse, moved]), np.stack([disc(10)] * 3))
    assert round_["stain_area"] == disc(10).sum()
    assert np.isclose(round_["stain_spread"], 10 / 2**0.5, rtol=0.02)  # of a uniform disc, Jacobi
    assert round_["stain_eccentricity"] < 0.05
    assert round_["stain_offset"] < 1e-5
    assert np.isclose(long["stain_eccentricity"], (1 - 0.25) ** 0.5, atol=0.02)
    assert np.isclose(aside["stain_offset"], 10, atol=0.1)


def test_extent_knows_no_brightness_and_is_finite_where_nothing_is_seen():
    masks = np.stack([disc(10), np.zeros((48, 48), bool), disc(9)])
    image = np.random.default_rng(0).random((48, 48)) + 2 * disc(7)
    one, brighter, empty = (extent(np.stack([k * image + b] * 3), masks) for k, b in ((1, 0), (5, 0.3), (0, 0.2)))
    for a, b in zip(one, brighter, strict=True):
        assert np.allclose(list(a.values()), list(b.values()), rtol=1e-3, atol=1e-3)
    assert one[1]["stain_offset"] == 0
    assert all(np.isfinite(list(row.values())).all() and row["stain_area"] == row["stain_spread"] == 0 for row in empty)
