"""Objects are counted, matched and told apart; the source's part comes out as planted."""

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from imgshared.evaluation.checks import Bright, check, objects, summarise, unmatched
from imgshared.prediction.types import PredictedCells

SIDE = 32


def spots(*places, side=SIDE, radius=3):
    y, x = np.indices((side, side))
    picture = np.zeros((side, side), np.float32)
    for row, column in places:
        picture[np.hypot(y - row, x - column) <= radius] = 1.0
    return picture


def cells(real, predicted):
    """One protein beside chromatin, all measured."""
    n = len(real)
    both = [np.stack([np.zeros_like(x), x], 1).astype(np.float32) for x in (np.asarray(real), np.asarray(predicted))]
    masks = np.zeros((n, SIDE, SIDE), bool)
    return PredictedCells(np.arange(n), both[0], np.ones((n, 2), bool), masks, {"predicted": both[1]}, {}, {})


def checked(real, predicted):
    done = cells(real, predicted)
    bright = Bright(2)
    bright.add(done.real, done.measured)
    ((table, maps),) = check(done, ("DNA", "P"), 0, bright)
    return table, maps


def test_objects_are_regions_of_one_picture():
    both = np.stack([spots((8, 8), (24, 24)), spots((16, 16))])
    both[0, 31, 0] = 1  # too small
    both[1, 0, 10:20] = 1
    labels = objects(both, 0.5)
    assert labels[0].max() == 2
    assert set(np.unique(labels[1])) <= {0, 3, 4}
    assert labels[0, 8, 8] != labels[0, 24, 24]
    assert objects(np.zeros((2, 8, 8), np.float32), 0.5).max() == 0


def test_objects_match_where_half_of_one_lies_in_the_other():
    a = objects(np.stack([spots((10, 10), (24, 24))]), 0.5)
    assert not unmatched(a, a).any()
    near = objects(np.stack([spots((10, 11), (4, 26))]), 0.5)
    assert list(unmatched(a, near)) == [False, False, True]
    assert unmatched(near, a).sum() == 1
    assert unmatched(near, a)[near[0, 4, 26]]


def test_found_and_invented_are_counted_cell_by_cell():
    real = [spots((8, 8), (24, 24)), spots((8, 8)), spots((16, 16)), spots((16, 16))]
    predicted = [spots((8, 8)), spots((8, 8), (24, 24)), spots((4, 4)), spots((16, 16))]
    table, maps = checked(real, predicted)
    assert list(table["objects"]) == [2, 1, 1, 1]
    assert list(table["found"]) == [1, 1, 0, 1]
    assert list(table["drawn"]) == [1, 2, 1, 1]
    assert list(table["invented"]) == [0, 1, 1, 0]
    assert maps.cells == 4
    assert maps.missed[24, 24] == maps.missed[16, 16] == 1
    assert maps.invented[24, 24] == maps.invented[4, 4] == 1
    assert maps.real[8, 8] == 2
    assert (maps + maps).cells == 8

    scores = summarise(table.assign(group=[0, 0, 1, 1])).set_index("score")["value"]
    assert scores["found"] == pytest.approx(3 / 5)
    assert scores["invented"] == pytest.approx(2 / 5)
    assert scores["objects"] == pytest.approx(5 / 4)


def test_a_blur_loses_objects_but_invents_none():
    rng = np.random.default_rng(0)
    real = np.stack([spots(*rng.integers(6, 26, (3, 2)), radius=2) for _ in range(30)])
    table, _ = checked(real, gaussian_filter(real, (0, 6, 6)))
    scores = summarise(table.assign(group=np.arange(30) % 5)).set_index("score")["value"]
    assert scores["found"] < 0.1
    assert np.isnan(scores["invented"]) or scores["invented"] == 0
    perfect, _ = checked(real, real)
    scores = summarise(perfect.assign(group=np.arange(30) % 5)).set_index("score")["value"]
    assert (scores["found"], scores["invented"], scores["moves"]) == pytest.approx((1, 0, 1))
    assert scores["own"] > 0.5


def test_a_prediction_that_ignores_its_source_is_caught():
    rng = np.random.default_rng(0)
    real = np.stack([spots(*rng.integers(6, 26, (3, 2))) for _ in range(40)])
    table, _ = checked(real, np.broadcast_to(real.mean(0), real.shape))
    scores = summarise(table.assign(group=np.arange(40) % 5)).set_index("score")
    assert scores.loc["own", "value"] == pytest.approx(0, abs=1e-9)
    assert scores.loc["moves", "value"] == 0


def test_nobody_is_paired_with_itself_and_missing_stains_are_left_out():
    real = np.stack([spots((16, 16))] * 3)
    done = cells(real, real)
    done.measured[1:, 1] = False
    bright = Bright(2)
    bright.add(done.real, done.measured)
    assert list(check(done, ("DNA", "P"), 0, bright)) == []  # one cell alone has no other
    assert np.isnan(bright.threshold(0))  # constant chromatin
    assert np.isnan(Bright(1).threshold(0))
    assert summarise(pd.DataFrame()).empty
