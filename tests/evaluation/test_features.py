"""Features see what they should, and nothing of the nucleus's shape unless asked."""

import numpy as np
from scipy.ndimage import gaussian_filter

from imgshared.evaluation.features import SHAPE, STAIN_NAMES, blur, frame, shape_features, stain_features


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
