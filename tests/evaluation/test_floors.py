"""The floors recover what is planted for them."""

import numpy as np

from imgshared.evaluation.features import blur
from imgshared.evaluation.floors import BlurredRidge, Floors

rng = np.random.default_rng(0)
chromatin = blur(rng.normal(0.5, 1, (60, 32, 32)).astype(np.float32), 1.0)


def test_a_planted_linear_relation_is_recovered_on_new_cells():
    stain = 0.3 * chromatin + 2 * blur(chromatin, 4) - 0.7
    ridge = BlurredRidge()
    ridge.add(chromatin[:20], stain[:20])
    ridge.add(chromatin[20:40], stain[20:40])
    error = np.abs(ridge.predict(chromatin[40:]) - stain[40:])
    assert error.mean() < 0.02 * stain[40:].std()


def test_blurs_wider_than_the_crop_are_left_out():
    ridge = BlurredRidge()
    small = chromatin[:, :16, :16]
    ridge.add(small, small * 2)
    assert ridge.predict(small).shape == small.shape
    assert ridge._xx.shape == (6, 6)  # sigma 0, 1, 2, 4, 8 and the constant


def test_blocks_and_unmeasured_cells_make_no_difference():
    images = np.stack([chromatin, 1 - chromatin], 1)
    measured = np.ones((60, 2), bool)
    measured[::3, 1] = False
    images[~measured] = 0
    floors = Floors(2, 0)
    floors.add(images[:30], measured[:30])
    floors.add(images[30:], measured[30:])
    np.testing.assert_allclose(floors.marker_mean(1), images[measured[:, 1], 1].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(floors.linear(1, chromatin), 1 - chromatin, atol=0.02)
