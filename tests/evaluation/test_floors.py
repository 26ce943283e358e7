"""The floors recover what is planted for them."""

import numpy as np

from imgshared.data.features import blur
from imgshared.evaluation.floors import Floors

rng = np.random.default_rng(0)
chromatin = blur(rng.normal(0.5, 1, (60, 32, 32)).astype(np.float32), 1.0)


def test_a_planted_linear_relation_is_recovered_on_new_cells():
    stain = 0.3 * chromatin + 2 * blur(chromatin, 4) - 0.7
    images, measured = np.stack([chromatin, stain], 1), np.ones((60, 2), bool)
    floors = Floors(2, [0])
    floors.add(images[:20], measured[:20])
    floors.add(images[20:40], measured[20:40])
    error = np.abs(floors.linear(1, images[40:]) - stain[40:])
    assert error.mean() < 0.02 * stain[40:].std()


def test_blurs_wider_than_the_crop_are_left_out():
    small = chromatin[:, None, :16, :16]
    floors = Floors(1, [0])
    floors.add(small, np.ones((60, 1), bool))
    assert floors._regression.sigmas == (0, 1, 2, 4, 8)
    assert floors.linear(0, small).shape == small[:, 0].shape


def test_a_marker_never_shown_with_chromatin_is_guessed_by_its_mean():
    images = np.stack([chromatin, 1 - chromatin], 1)
    measured = np.arange(60)[:, None] % 2 == np.arange(2)  # one of the two stains in each cell
    floors = Floors(2, [0])
    floors.add(images * measured[..., None, None], measured)
    np.testing.assert_allclose(floors.linear(1, images[:3])[2], floors.marker_mean(1))


def test_blocks_and_unmeasured_cells_make_no_difference():
    images = np.stack([chromatin, 1 - chromatin], 1)
    measured = np.ones((60, 2), bool)
    measured[::3, 1] = False
    images[~measured] = 0
    floors = Floors(2, [0])
    floors.add(images[:30], measured[:30])
    floors.add(images[30:], measured[30:])
    np.testing.assert_allclose(floors.marker_mean(1), images[measured[:, 1], 1].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(floors.linear(1, images), 1 - chromatin, atol=0.02)


def test_a_stain_is_regressed_on_all_that_it_is_predicted_from():
    other = blur(rng.normal(0.5, 1, (60, 32, 32)).astype(np.float32), 1.0)
    stain = 0.3 * chromatin + 2 * blur(other, 2)
    images, measured = np.stack([chromatin, other, stain], 1), np.ones((60, 3), bool)
    measured[::2, 1] = False
    errors = []
    for sources in ([0], [0, 1]):
        floors = Floors(3, sources)
        floors.add(
            images[:40] * measured[:40, :, None, None], measured[:40]
        )  # only cells that show both are learnt from
        errors.append(np.abs(floors.linear(2, images[40:]) - stain[40:]).mean() / stain[40:].std())
    assert errors[1] < 0.02 < 0.5 < errors[0]
    again = Floors(3, [0, 1])
    again.add(images[1:40:2], measured[1:40:2] & [True, False, True], np.ones(20, bool))  # a source counts as no target
    np.testing.assert_allclose(again.linear(2, images[40:]), floors.linear(2, images[40:]), atol=0.05)
    assert not again.known(1)
