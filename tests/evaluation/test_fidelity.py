"""Every guess has every score, the floors beside; detail is a ratio, averaged as one."""

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from imgshared import metrics
from imgshared.evaluation.fidelity import FLOORS, FOLD, MOMENTS, SCORES, _scores, by_group, compare, summarise
from imgshared.evaluation.floors import Floors
from imgshared.prediction.types import PredictedCells

SIDE = 24


@pytest.fixture(scope="module")
def table():
    """A stain that is predicted blurred, rebuilt perfectly and drawn with twice the contrast."""
    rng = np.random.default_rng(0)
    real = gaussian_filter(rng.normal(0.5, 1, (60, 2, SIDE, SIDE)), (0, 0, 0.8, 0.8)).astype(np.float32)
    measured = np.ones((60, 2), bool)
    measured[::6, 1] = False
    floors = Floors(2, [0])
    floors.add(real, measured)
    images = {"predicted": gaussian_filter(real, (0, 0, 3, 3)), "full": real.copy(), "shared": 2 * real}
    cells = PredictedCells(np.arange(60), real, measured, np.ones((60, SIDE, SIDE), bool), images, {}, {})
    found = compare(cells, ("DNA", "P"), 0, floors)
    sums = compare(cells, ("DNA", "P"), 0, floors, sums_only=True)
    rest = found[found["prediction"] != "linear"].reset_index(drop=True)
    pd.testing.assert_frame_equal(sums, rest[sums.columns])
    assert list(sums) == ["position", "marker", "prediction", "intensity_real", "intensity_predicted", *MOMENTS]
    return found.assign(group=[f"g{p % 5}" for p in found["position"]])


def row(table, prediction, score):
    return table.query("prediction == @prediction and score == @score").iloc[0]


def test_every_guess_and_both_floors_have_every_score(table):
    found = summarise(table)
    predictions = ["predicted", "full", "shared", *FLOORS]
    assert list(zip(found["prediction"], found["score"], strict=True)) == [(p, s) for p in predictions for s in SCORES]
    assert set(found["cells"]) == {50}
    assert set(found["groups"]) == {5}
    groups = by_group(table)
    assert set(groups["prediction"]) == set(predictions)
    assert groups.query("prediction == 'predicted'")[list(SCORES)].notna().all(axis=None)


def test_detail_is_lost_by_a_blur_and_kept_by_the_stain_itself(table):
    found = summarise(table)
    assert row(found, "full", "detail")["value"] == pytest.approx(1)
    assert row(found, "shared", "detail")["value"] == pytest.approx(4)  # a power
    for prediction in ("predicted", "marker_mean"):
        r = row(found, prediction, "detail")
        assert 0 < r["low"] < r["value"] < r["high"] < 0.1
    own = by_group(table).query("prediction == 'shared'")["detail"]
    np.testing.assert_allclose(own, 4, rtol=1e-4)


def rows(detail, groups):
    """A table in which nothing but the detail is of interest."""
    return pd.DataFrame(
        {"marker": "P", "prediction": "predicted", "group": groups, "detail": np.asarray(detail, float)}
        | dict.fromkeys(("l1", "pearson", "ssim"), 0.0)
        | {"intensity_real": np.arange(len(groups)), "intensity_predicted": np.arange(len(groups))}
        | dict.fromkeys(("n", "a", "b", "aa", "bb", "ab"), 1.0)
    )


def test_detail_is_a_geometric_mean_with_the_interval_of_the_logarithm():
    detail, groups = [2, 0.5, 4, 0.25, 2, 1], ["a", "a", "b", "b", "c", "c"]
    r = row(summarise(rows(detail, groups)), "predicted", "detail")
    assert r["value"] == pytest.approx(2 ** (1 / 6))
    log = metrics.estimate(groups, metrics.mean(groups, np.log(detail)))
    assert (r["low"], r["high"]) == pytest.approx((np.exp(log.low), np.exp(log.high)))
    turned = row(summarise(rows(1 / np.asarray(detail), groups)), "predicted", "detail")
    assert (turned["value"], turned["low"], turned["high"]) == pytest.approx(
        (1 / r["value"], 1 / r["high"], 1 / r["low"])
    )
    assert list(by_group(rows(detail, groups))["detail"]) == pytest.approx([1, 1, np.sqrt(2)])


def test_a_constant_prediction_of_a_stain_that_is_not_has_a_correlation_of_0():
    rng = np.random.default_rng(0)
    real, guess = rng.random((4, 8, 8), np.float32), rng.random((4, 8, 8), np.float32)
    guess[1], real[2], guess[3], real[3] = 0.5, 0.5, 0.5, 0.5
    found = _scores(real, guess)["pearson"]
    assert found[0] == pytest.approx(np.corrcoef(real[0].ravel(), guess[0].ravel())[0, 1])
    assert found[1] == 0
    assert np.isnan(found[2:]).all()  # of a flat real stain nothing can be said


def test_a_flat_prediction_counts_as_without_detail_and_a_flat_real_stain_not_at_all():
    groups = ["a", "a", "b", "b"]
    flat = row(summarise(rows([0, 0, 0, 0], groups)), "predicted", "detail")
    assert flat["value"] == pytest.approx(1 / FOLD)
    assert flat["low"] >= 1 / FOLD * 0.999
    some = summarise(rows([0, 1, np.nan, 1], groups))
    assert row(some, "predicted", "detail")["value"] == pytest.approx(FOLD ** (-1 / 3))
    wild = row(summarise(rows([1e12, 1, 1, 1], groups)), "predicted", "detail")
    assert wild["value"] == pytest.approx(FOLD**0.25)  # one nearly empty real stain must not decide
    assert np.isnan(row(summarise(rows([np.nan] * 4, groups)), "predicted", "detail")["value"])
