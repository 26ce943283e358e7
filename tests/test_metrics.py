"""Closed forms and independent references for imgshared.metrics."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

from imgshared import metrics

rng = np.random.default_rng(0)


def value(groups, statistic):
    return metrics.estimate(groups, statistic, n=100).value


def test_l1_closed_form():
    np.testing.assert_allclose(
        metrics.l1(np.zeros((2, 4, 4)), np.array([0.5, -2.0])[:, None, None] * np.ones((4, 4))), [0.5, 2]
    )


def test_pearson_is_scale_free_and_nan_for_constants():
    image = rng.random((3, 8, 8))
    other = np.stack([2 * image[0] + 1, -image[1], np.ones((8, 8))])
    np.testing.assert_allclose(metrics.pearson(image, other), [1, -1, np.nan])
    noise = rng.random((3, 8, 8))
    expected = [stats.pearsonr(a.ravel(), b.ravel())[0] for a, b in zip(image, noise, strict=True)]
    np.testing.assert_allclose(metrics.pearson(image, noise), expected)


def test_ssim_is_one_for_itself_and_sees_brightness():
    image = rng.random((2, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(metrics.ssim(image, image), 1)
    assert (metrics.ssim(image, image * 0.2) < 0.6).all()


def test_scores_match_independent_references():
    n = 300
    groups = rng.integers(0, 7, n)
    a, b = rng.normal(5, 1, n), rng.normal(5, 1, n)
    b += a
    assert value(groups, metrics.correlation(groups, a, b)) == pytest.approx(stats.pearsonr(a, b)[0])
    assert value(groups, metrics.correlation(groups, a, b, ranks=True)) == pytest.approx(stats.spearmanr(a, b)[0])
    assert value(groups, metrics.r2(groups, b, a)) == pytest.approx(r2_score(b, a))
    assert value(groups, metrics.mean(groups, np.where(a > 5, a, np.nan))) == pytest.approx(a[a > 5].mean())
    truth, guess = rng.integers(0, 3, n), rng.integers(0, 3, n)
    assert value(groups, metrics.balanced_accuracy(groups, truth, guess)) == pytest.approx(
        balanced_accuracy_score(truth, guess)
    )
    scores = rng.dirichlet(np.ones(3), n).round(1)  # rounding makes ties
    expected = np.mean([roc_auc_score(truth == k, scores[:, k]) for k in range(3)])
    assert value(groups, metrics.auroc(groups, truth, scores)) == pytest.approx(expected)
    two = rng.integers(0, 2, n)
    both = np.column_stack([1 - scores[:, 0], scores[:, 0]])
    assert value(groups, metrics.auroc(groups, two, both)) == pytest.approx(roc_auc_score(two, both[:, 1]))


def test_pooled_correlation_is_that_of_all_pixels():
    a, b = rng.random((6, 5, 5)), rng.random((6, 5, 5))
    sums = np.stack([x.sum((1, 2)) for x in (np.ones_like(a), a, b, a * a, b * b, a * b)], 1)
    assert value(range(6), metrics.pooled_correlation(range(6), sums)) == pytest.approx(
        stats.pearsonr(a.ravel(), b.ravel())[0]
    )


def test_constants_are_nan():
    groups = np.arange(10)
    assert np.isnan(value(groups, metrics.correlation(groups, np.ones(10), np.arange(10.0))))
    assert np.isnan(value(groups, metrics.auroc(groups, np.zeros(10, int), np.full((10, 2), 0.5))))


def test_bootstrap_draws_whole_groups():
    """Each draw must equal the statistic on the cells of the drawn groups, repeated."""
    groups = np.array(list("aaabbcccc"))
    truth, p = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1]), rng.random(9)
    scores = np.column_stack([1 - p, p])
    cells = np.concatenate([np.flatnonzero(groups == g) for g in "accc"])
    drawn = metrics.auroc(groups, truth, scores)(np.array([[1.0, 0.0, 3.0]]))[0]
    assert drawn == pytest.approx(roc_auc_score(truth[cells], p[cells]))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        groups = np.repeat(np.arange(30), 20)
        values = random.normal(0, 1, 30)[groups] + random.normal(0, 1, 600)  # cells of a group go together
        low, high = metrics.bootstrap_interval(groups, metrics.mean(groups, values), 300, seed)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_one_group_has_no_interval():
    assert np.isnan(metrics.bootstrap_interval(np.zeros(5), metrics.mean(np.zeros(5), np.arange(5.0)))).all()
