"""Readers that learnt from real stains answer on predicted ones; agreement beyond chance."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from imgshared.evaluation.agreement import CLIP, Reader, Standard, feature_distance

rng = np.random.default_rng(0)


def drawn(n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of which one tells the class, on an odd scale, and one is constant."""
    truth = rng.integers(classes, size=n)
    return np.column_stack([100 + 5 * (truth + 0.3 * rng.normal(size=n)), rng.normal(size=n), np.full(n, 7.0)]), truth


def test_features_are_standardised_by_the_training_cells_and_clipped():
    features, _ = drawn(500, 2)
    z = Standard.of(features)(np.vstack([features, [1e6, -1e6, 7.0]]))
    np.testing.assert_allclose(z[:-1, 1].std(), 1, atol=0.05)
    np.testing.assert_allclose(z[-1], [CLIP, -CLIP, 0])


@pytest.mark.parametrize("classes", [2, 3])
def test_a_reader_reads_what_is_planted(classes):
    train, truth = drawn(600, classes)
    standard = Standard.of(train)
    reader = Reader.fit(standard(train), np.array(["a", "b", "c"])[truth])
    test, truth = drawn(300, classes)
    names = np.array(["a", "b", "c"])[truth]
    accuracy = reader.accuracy(standard(test), names)
    assert accuracy > 0.9
    assert accuracy == pytest.approx(balanced_accuracy_score(names, reader(standard(test))))
    blind = test.copy()
    blind[:, 0] = test[:, 0].mean()
    assert reader.accuracy(standard(blind), names) < 1 / classes + 0.2


def test_features_of_one_distribution_are_no_distance_apart():
    features, _ = drawn(1200, 2)
    standard = Standard.of(features)
    assert abs(feature_distance(features[:600], features[600:], standard)) < 0.06
    assert feature_distance(features[:600], features[600:] + np.array([5, 0, 0]), standard) > 0.2
