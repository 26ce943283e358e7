"""Closed forms and independent references for imgshared.metrics."""

import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import gaussian_filter
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, r2_score, roc_auc_score

from imgshared import metrics

rng = np.random.default_rng(0)


def value(groups, statistic):
    return metrics.estimate(groups, statistic).value


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


def test_ssim_of_one_window_is_its_closed_form_whatever_the_range_of_the_image():
    a, b = 0.2 * rng.random((2, 1, 7, 7))
    (var_a, cov), (_, var_b) = np.cov(a.ravel(), b.ravel())
    c1, c2 = 0.01**2, 0.03**2
    light = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
    assert metrics.ssim(a, b)[0] == pytest.approx(light * (2 * cov + c2) / (var_a + var_b + c2))


def test_spectral_ratio_closed_forms():
    image = gaussian_filter(rng.random((4, 32, 24)), (0, 1, 1))
    np.testing.assert_allclose(metrics.spectral_ratio(image, image), 1)
    np.testing.assert_allclose(metrics.spectral_ratio(image, 0.5 * image + 3), 0.25)  # a power; the mean is removed
    blurred = gaussian_filter(image, (0, 2, 2))
    assert (metrics.spectral_ratio(image, blurred) < 0.2).all()
    noisy = image + rng.normal(0, image.std(), image.shape)
    assert (metrics.spectral_ratio(image, noisy) > 1.5).all()
    assert np.isnan(metrics.spectral_ratio(np.ones((1, 16, 16)), image[:1, :16, :16])).all()
    assert metrics.spectral_ratio(image[:1], np.ones((1, 32, 24))) == [0]


def test_spectral_ratio_is_of_structures_finer_than_asked():
    y, x = np.mgrid[:64, :64]
    coarse, fine = np.sin(2 * np.pi * x / 32), np.sin(2 * np.pi * (x + y) / 5)  # 32 and 3.5 px
    real = (coarse + fine)[None]
    assert metrics.spectral_ratio(real, (coarse + 0.1 * fine)[None])[0] == pytest.approx(0.01, rel=0.2)
    assert metrics.spectral_ratio(real, (0.1 * coarse + fine)[None])[0] == pytest.approx(1, rel=0.02)
    assert metrics.spectral_ratio(real, (0.1 * coarse + fine)[None], finest=64)[0] < 0.6


def test_spectral_ratio_against_a_slow_transform():
    real, predicted = rng.random((1, 10, 12)), rng.random((1, 10, 12))
    n, m = 10, 12
    window = np.outer(*[np.sin(np.pi * np.arange(1, k + 1) / (k + 1)) ** 2 for k in (n, m)])
    power = []
    for image in (real[0], predicted[0]):
        weighted, total = (image - image.mean()) * window, 0.0
        for u in range(n):
            for v in range(m // 2 + 1):  # the other half mirrors it
                frequency = np.hypot(min(u, n - u) / n, v / m)
                wave = np.exp(-2j * np.pi * (u * np.arange(n)[:, None] / n + v * np.arange(m) / m))
                total += abs((weighted * wave).sum()) ** 2 * (frequency > 1 / 8)
        power.append(total)
    assert metrics.spectral_ratio(real, predicted)[0] == pytest.approx(power[1] / power[0])


def test_kernel_distance_is_its_double_sum():
    x, y = rng.normal(0, 1, (6, 3)), rng.normal(0.5, 1, (4, 3))

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    expected = sum(k(x[i], x[j]) for i in range(6) for j in range(6) if i != j) / 30
    expected += sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    expected -= 2 * sum(k(a, b) for a in x for b in y) / 24
    assert metrics.kernel_distance(x, y) == pytest.approx(expected)
    assert metrics.kernel_distance(y, x) == pytest.approx(expected)


def test_kernel_distance_is_unbiased_and_grows_with_the_shift():
    draws = [metrics.kernel_distance(rng.normal(0, 1, (40, 4)), rng.normal(0, 1, (30, 4))) for _ in range(300)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 300**0.5  # a biased one would be above 0
    x, y = rng.normal(0, 1, (400, 4)), rng.normal(0, 1, (400, 4))
    found = [metrics.kernel_distance(x, y + shift) for shift in (0, 0.5, 1, 2)]
    assert abs(found[0]) < 0.1
    assert found == sorted(found)
    assert found[1] > 5 * abs(found[0])
    assert metrics.kernel_distance(x, 2 * y) > 5 * abs(found[0])  # a wider spread is another distribution


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


def test_a_ratio_is_of_sums_not_a_mean_of_ratios():
    groups, part, whole = np.array([0, 0, 1]), np.array([1, 0, 3]), np.array([2, 0, 3])
    assert value(groups, metrics.ratio(groups, part, whole)) == pytest.approx(4 / 5)
    assert np.isnan(value(groups, metrics.ratio(groups, part, 0 * whole)))


def test_kappa_is_cohens_and_counts_drawn_groups():
    groups, a, b = np.arange(200) % 4, rng.integers(3, size=200), rng.integers(3, size=200)
    b = np.where(rng.random(200) < 0.5, a, b)
    assert value(groups, metrics.kappa(groups, a, b)) == pytest.approx(cohen_kappa_score(a, b))
    assert value(groups, metrics.kappa(groups, a, a)) == 1
    rows = np.concatenate([np.flatnonzero(groups == g) for g, k in enumerate((2, 0, 1, 3)) for _ in range(k)])
    drawn = metrics.kappa(groups, a, b)(np.array([[2.0, 0.0, 1.0, 3.0]]))[0]
    assert drawn == pytest.approx(cohen_kappa_score(a[rows], b[rows]))


def test_one_answer_for_all_is_no_agreement():
    groups = np.zeros(9)
    assert value(groups, metrics.kappa(groups, groups, np.r_[np.zeros(8), 1])) == 0
    assert value(groups, metrics.kappa(groups, groups, groups)) == 0


def test_effect_size_is_cohens_d():
    groups, positive = np.arange(40) % 4, np.arange(40) < 15
    values = rng.normal(1e3, 2, 40) + 3 * positive
    a, b = values[positive], values[~positive]
    pooled = ((14 * a.var(ddof=1) + 24 * b.var(ddof=1)) / 38) ** 0.5
    d = (a.mean() - b.mean()) / pooled
    assert value(groups, metrics.effect_size(groups, positive, values)) == pytest.approx(d)
    # The same from Student's t, an independent reference; and of drawn groups as of the cells repeated.
    assert d == pytest.approx(stats.ttest_ind(a, b).statistic * (1 / 15 + 1 / 25) ** 0.5)
    counts = np.array([[2.0, 0.0, 1.0, 3.0]])
    rows = np.concatenate([np.flatnonzero(groups == g) for g, k in enumerate((2, 0, 1, 3)) for _ in range(k)])
    again = metrics.effect_size(np.zeros(len(rows)), positive[rows], values[rows])
    assert metrics.effect_size(groups, positive, values)(counts)[0] == pytest.approx(again(np.ones((1, 1)))[0])
    doubled = metrics.effect_size(groups, positive, values, over=2 * values + 7)
    assert value(groups, doubled) == pytest.approx(d / 2)
    assert value(groups, metrics.effect_size(groups, positive, np.full(40, 0.1), over=values)) == pytest.approx(0)
    assert np.isnan(value(groups, metrics.effect_size(groups, positive, np.full(40, 0.1))))
    assert np.isnan(value(groups, metrics.effect_size(groups, np.arange(40) < 1, values)))


def test_ranks_agree_as_spearmans_does():
    def constants(values):
        return [lambda counts, v=v: np.full(len(counts), v) for v in values]

    one, other = rng.normal(size=9), rng.normal(size=9)
    found = metrics.rank_agreement(constants(one), constants(other))(np.ones((3, 2)))
    np.testing.assert_allclose(found, stats.spearmanr(one, other).statistic)
    assert np.isnan(metrics.rank_agreement(constants([np.nan, 1]), constants([1, 2]))(np.ones((1, 2)))).all()
    assert np.isnan(metrics.rank_agreement([], [])(np.ones((1, 2)))).all()


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
    three = np.where(groups == groups[-1], 2, np.arange(10) % 2)  # a class that one group alone holds
    found = metrics.estimate(groups, metrics.auroc(groups, three, np.eye(3)[three]), metrics.SHARE)
    assert (found.value, found.low, found.high) == (1, 0, 1)


def test_counts_are_of_whole_groups():
    """A statistic of drawn groups must equal the statistic on their cells, repeated."""
    groups = np.array(list("aaabbcccc"))
    truth, p = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1]), rng.random(9)
    scores = np.column_stack([1 - p, p])
    cells = np.concatenate([np.flatnonzero(groups == g) for g in "accc"])
    drawn = metrics.auroc(groups, truth, scores)(np.array([[1.0, 0.0, 3.0]]))[0]
    assert drawn == pytest.approx(roc_auc_score(truth[cells], p[cells]))


def test_interval_of_a_mean_is_students_over_groups_of_one_size():
    groups, values = np.arange(60) % 6, rng.normal(size=60)
    found = metrics.estimate(groups, metrics.mean(groups, values))
    means = [values[groups == g].mean() for g in range(6)]
    assert found.value == pytest.approx(values.mean())
    assert found[1:] == pytest.approx(stats.ttest_1samp(means, 0).confidence_interval(0.95))


@pytest.mark.parametrize("count", [3, 8])
def test_interval_covers_the_truth_as_often_as_it_says(count):
    covered = 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        groups = np.repeat(np.arange(count), 20)
        values = random.normal(0, 1, count)[groups] + random.normal(0, 1, 20 * count)  # a group's cells go together
        _, low, high = metrics.estimate(groups, metrics.mean(groups, values))
        covered += low <= 0 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_intervals_keep_their_bounds_and_say_where_one_group_carries_all():
    groups = np.repeat(np.arange(3), 10)
    values = np.where(groups == 0, 1.0, 0.0)
    _, low, high = metrics.estimate(groups, metrics.mean(groups, values), metrics.SHARE)
    assert (low, high) == (0, 1)
    truth = np.where(groups == 0, np.arange(30) % 2, 0)  # without the first group there is one class
    p = rng.random(30)
    found = metrics.estimate(groups, metrics.auroc(groups, truth, np.column_stack([1 - p, p])), metrics.SHARE)
    assert found[1:] == (0, 1)


def test_one_group_has_no_interval():
    assert np.isnan(metrics.estimate(np.zeros(5), metrics.mean(np.zeros(5), np.arange(5.0)))[1:]).all()
