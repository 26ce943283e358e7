"""Pure functions on arrays: image agreement, prediction scores, and intervals over groups.

A score of many cells is a *statistic of the groups*: a function from how often each group counts, ``(B, G)`` in the
order of ``np.unique(groups)``, to ``(B,)`` values. All are ratios of sums over cells, so one table of sums a group
serves every set of counts at once: leaving out each group in turn costs a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from scipy.stats import t as student
from skimage.metrics import structural_similarity

Floats = NDArray[np.floating[Any]]
SHARE, SIGNED = (0.0, 1.0), (-1.0, 1.0)  # bounds of shares and of correlations
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class Estimate(NamedTuple):
    """A value and its 95% interval; NaN bounds where there are too few groups to say."""

    value: float
    low: float
    high: float


# --- images ---------------------------------------------------------------------------------------------------------


def l1(real: Floats, predicted: Floats) -> NDArray[np.float64]:
    """Mean absolute difference of each image: (n, Y, X) and (n, Y, X) to (n,)."""
    return np.asarray(np.abs(real - predicted).mean((-2, -1)), np.float64)


def pearson(real: Floats, predicted: Floats) -> NDArray[np.float64]:
    """Correlation over each image's pixels: (n, ...) and (n, ...) to (n,) in [-1, 1], NaN where either is constant."""
    a, b = (np.reshape(x, (len(x), -1)).astype(np.float64) for x in (real, predicted))
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    square = np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", b, b)
    return _ratio(np.einsum("ij,ij->i", a, b), np.sqrt(np.where(square > 1e-20, square, np.nan)))


def ssim(real: Floats, predicted: Floats, data_range: float = 1.0) -> NDArray[np.float64]:
    """Structural similarity of each image (Wang et al. 2004, 7-pixel window): (n, Y, X) and (n, Y, X) to (n,).

    `data_range` is fixed, never taken from the image: an image's own range would hide errors of brightness.
    """
    return np.array([structural_similarity(a, b, data_range=data_range) for a, b in zip(real, predicted, strict=True)])


def spectral_ratio(real: Floats, predicted: Floats, finest: float = 8.0) -> NDArray[np.float64]:
    """Power of structures finer than `finest` pixels, predicted over real: (n, Y, X) and (n, Y, X) to (n,).

    Of the periodograms under a Hann window, mean removed. 1: as much detail (and noise) as the real image; towards 0: a
    blur; above 1: detail that the real image has not. NaN where the real image has none.
    """
    height, width = real.shape[-2:]
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[1:-1]
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    fine = np.hypot(y, x) > 1 / finest
    power = []
    for images in (real, predicted):
        centred = images - images.mean((-2, -1), keepdims=True)
        spectrum = np.fft.rfft2(centred * window)
        power.append((spectrum.real**2 + spectrum.imag**2)[:, fine].sum(1))
    return _ratio(power[1], power[0])


def kernel_distance(real: ArrayLike, predicted: ArrayLike) -> float:
    """Kernel distance of two sets of features, (n, D) and (m, D), a row a cell; 0 where they are of one distribution.

    The unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3``: KID (Binkowski et al. 2018) with
    whatever extractor made the features. Unbiased, so it may fall below 0.
    """
    x, y = np.asarray(real, np.float64), np.asarray(predicted, np.float64)
    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = (((a @ b.T) / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


# --- scores over cells ----------------------------------------------------------------------------------------------


def mean(groups: ArrayLike, values: ArrayLike) -> Statistic:
    """Mean of one value a cell, NaN values left out."""
    v = np.asarray(values, np.float64)
    known = ~np.isnan(v)
    sums = _sums(groups, np.column_stack([np.where(known, v, 0), known]))
    return lambda counts: _ratio(*(counts @ sums).T)


def ratio(groups: ArrayLike, part: ArrayLike, whole: ArrayLike) -> Statistic:
    """Sum of one value over the sum of another, over cells; NaN where the latter is 0."""
    sums = _sums(groups, np.column_stack([np.asarray(part, np.float64), np.asarray(whole, np.float64)]))
    return lambda counts: _ratio(*(counts @ sums).T)


def correlation(groups: ArrayLike, a: ArrayLike, b: ArrayLike, *, ranks: bool = False) -> Statistic:
    """Pearson correlation across cells, or Spearman's with `ranks` (taken once, over all cells); NaN for constants."""
    x, y = (rankdata(v) if ranks else np.asarray(v, np.float64) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()  # the sums of squares below would otherwise cancel
    return pooled_correlation(groups, np.column_stack([np.ones_like(x), x, y, x * x, y * y, x * y]))


def pooled_correlation(groups: ArrayLike, moments: ArrayLike) -> Statistic:
    """Pearson correlation over the pixels of all cells, from each cell's (n, 6) sums of 1, a, b, a a, b b, a b."""
    sums = _sums(groups, moments)

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        n, a, b, aa, bb, ab = (counts @ sums).T
        spread = (aa - _ratio(a * a, n)) * (bb - _ratio(b * b, n))
        return _ratio(ab - _ratio(a * b, n), np.sqrt(np.where(spread > 1e-12 * aa * bb, spread, np.nan)))

    return statistic


def r2(groups: ArrayLike, truth: ArrayLike, predicted: ArrayLike) -> Statistic:
    """Coefficient of determination across cells, 1 - residual / total sum of squares; below 0: worse than a mean."""
    y, p = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    y, p = y - y.mean(), p - y.mean()
    sums = _sums(groups, np.column_stack([np.ones_like(y), y, y * y, (y - p) ** 2]))

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        n, first, second, residual = (counts @ sums).T
        return 1 - _ratio(residual, second - _ratio(first**2, n))

    return statistic


def effect_size(groups: ArrayLike, positive: ArrayLike, values: ArrayLike, over: ArrayLike | None = None) -> Statistic:
    """Cohen's d (1988, eq. 2.5.1): mean of the positive cells minus that of the others, over their pooled deviation.

    Parameters
    ----------
    positive
        (n,) bool.
    values
        (n,) one value a cell.
    over
        (n,) whose pooled deviation is the unit; None: that of `values`. NaN results where it is 0 or a side has fewer
        than two cells.
    """
    chosen, v = np.asarray(positive, bool), np.asarray(values, np.float64)
    unit = v if over is None else np.asarray(over, np.float64)
    v, unit = v - v.mean(), unit - unit.mean()
    columns = [column for side in (chosen, ~chosen) for column in (side, side * v, side * unit, side * unit * unit)]
    sums = _sums(groups, np.column_stack(columns))

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        n, total, first, second, m, rest, other, squares = (counts @ sums).T
        within = second - _ratio(first**2, n) + squares - _ratio(other**2, m)
        variance = _ratio(within, np.where((n > 1) & (m > 1), n + m - 2, np.nan))
        return _ratio(_ratio(total, n) - _ratio(rest, m), np.sqrt(np.where(variance > 1e-12, variance, np.nan)))

    return statistic


def rank_agreement(one: Sequence[Statistic], other: Sequence[Statistic]) -> Statistic:
    """Spearman correlation across statistics: do the two lists rank their (paired) entries alike?"""

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        out = np.full(len(counts), np.nan)
        if len(one) < 2:
            return out
        a, b = (np.stack([s(counts) for s in side], axis=1) for side in (one, other))
        known = np.isfinite(a).all(1) & np.isfinite(b).all(1)
        if known.any():
            out[known] = pearson(rankdata(a[known], axis=1), rankdata(b[known], axis=1))
        return out

    return statistic


def balanced_accuracy(groups: ArrayLike, truth: ArrayLike, predicted: ArrayLike) -> Statistic:
    """Mean over the classes of the share of their cells that are recognised; chance is 1 / classes."""
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    member = truth[:, None] == np.unique(truth)
    total, right = _sums(groups, member), _sums(groups, member & (truth == predicted)[:, None])
    # A draw without any cell of a class says nothing of that class: NaN, so that the interval leaves it out.
    return lambda counts: np.asarray(_ratio(counts @ right, counts @ total).mean(1))


def kappa(groups: ArrayLike, one: ArrayLike, other: ArrayLike) -> Statistic:
    """Cohen's kappa (1960) of two answers a cell: 1 for the same, 0 for no more agreement than their frequencies bring.

    0 also where one side always gives the same answer: it tells nothing, however often that answer is met.
    """
    a, b = np.asarray(one), np.asarray(other)
    classes = np.unique(np.concatenate([a, b]))
    first, second = (v[:, None] == classes for v in (a, b))
    k = len(classes)
    sums = _sums(groups, np.column_stack([np.ones(len(a)), a == b, first, second]))

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        n, same, *shares = (counts @ sums).T
        observed = _ratio(same, n)
        expected = _ratio((np.stack(shares[:k]) * np.stack(shares[k:])).sum(0), n * n)
        told = expected < 1 - 1e-12
        return np.where(told, _ratio(observed - expected, np.where(told, 1 - expected, 1)), 0.0)

    return statistic


def auroc(groups: ArrayLike, truth: ArrayLike, probabilities: ArrayLike) -> Statistic:
    """Area under the ROC curve; macro one-versus-rest where there are more than two classes. Chance is 0.5.

    Classes without a cell have no curve, and no say in the mean.

    Parameters
    ----------
    groups
        (n,) the unit of the interval.
    truth
        (n,) int, class codes 0 .. K - 1.
    probabilities
        (n, K) one column a class.
    """
    codes, scores = np.asarray(truth), np.asarray(probabilities, np.float64)
    classes = [1] if scores.shape[1] == 2 else list(range(scores.shape[1]))
    each = [_binary_auroc(groups, codes == k, scores[:, k]) for k in classes if 0 < (codes == k).sum() < len(codes)]

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        if not each:
            return np.full(len(counts), np.nan)
        return np.asarray(np.mean([one(counts) for one in each], 0))  # NaN where a class is lost with its group

    return statistic


def _binary_auroc(groups: ArrayLike, positive: NDArray[np.bool_], score: NDArray[np.float64]) -> Statistic:
    """U-statistic by pairs of groups: ``wins[g, h]`` positives of g above negatives of h, ties half."""
    names, code = np.unique(np.asarray(groups), return_inverse=True)
    _, rank = np.unique(score, return_inverse=True)
    wins = np.zeros((len(names), len(names)))
    totals = _sums(groups, np.column_stack([positive, ~positive]))
    for h in range(len(names)):  # one group's negatives at a time: memory stays at the number of cells
        below = np.bincount(rank[(code == h) & ~positive], minlength=rank.max() + 1)
        won = np.cumsum(below) - below / 2  # negatives of h with a lower score, and half of those with the same
        wins[:, h] = np.bincount(code[positive], won[rank[positive]], minlength=len(names))

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        pos, neg = (counts @ totals).T
        return _ratio(np.einsum("bg,gh,bh->b", counts, wins, counts, optimize=True), pos * neg)

    return statistic


# --- intervals ------------------------------------------------------------------------------------------------------


def estimate(groups: ArrayLike, statistic: Statistic, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """Return a statistic over all cells with its 95% interval over groups, kept within `bounds`.

    The delete-one-group jackknife with Student's t (Tukey 1958; Miller 1974): cells of a group are alike, so only
    groups are replicates. It holds the truth 93 to 96% of the time from three groups on; a percentile bootstrap of
    whole groups 72 to 76% with three and 91 to 93% with sixteen. Of an AUROC whose groups are of one class each it
    holds 90% with five groups, 94 to 95% from eight on (`scripts/study_intervals.py`).

    Returns
    -------
    NaN bounds with fewer than two groups. Where the statistic is undefined without one of the groups, it rests on that
    group, and the interval is all of `bounds`.
    """
    count = len(np.unique(np.asarray(groups)))
    value = float(statistic(np.ones((1, count)))[0])
    if count < 2 or np.isnan(value):
        return Estimate(value, np.nan, np.nan)
    without = statistic(1 - np.eye(count))
    if np.isnan(without).any():
        return Estimate(value, *bounds)
    half = student.ppf(0.975, count - 1) * np.sqrt((count - 1) * np.mean((without - without.mean()) ** 2))
    return Estimate(value, float(max(value - half, bounds[0])), float(min(value + half, bounds[1])))


def _sums(groups: ArrayLike, values: ArrayLike) -> NDArray[np.float64]:
    """Sum the (n, k) values of each group: (G, k)."""
    names, code = np.unique(np.asarray(groups), return_inverse=True)
    columns = np.asarray(values, np.float64)
    return np.stack([np.bincount(code, column, minlength=len(names)) for column in columns.T], axis=1)


def _ratio(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Divide, NaN where the denominator is zero or NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.asarray(np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), np.nan), where=b != 0))
