"""Do predicted stains say what the real ones say? Scores that look at per-cell features, not at pixels.

Features are `features.stain_features`, 45 a cell, in one frame for all cells: the stated extractor, deterministic,
without a network, and without the cells' outlines, which would make any two stains of a cell agree. They are
standardised by real training cells and clipped to +-3 standard deviations, so that no single feature of a faulty
prediction drowns the others. A reader learns a label from real stains of training groups and is then given the real
and the predicted stain of the same held-out cells: what counts is whether it gives the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression

from imgshared import metrics

Floats = NDArray[np.float64]
CLIP = 3.0  # standard deviations


@dataclass(frozen=True)
class Standard:
    """The scale of each feature over real training cells.

    Parameters
    ----------
    mean, sd
        (D,) of each feature; a constant feature has an `sd` of 1.
    """

    mean: Floats
    sd: Floats

    @staticmethod
    def of(features: ArrayLike) -> Standard:
        """Take the scale of (n, D) features."""
        x = np.asarray(features, np.float64)
        sd = x.std(0)
        return Standard(x.mean(0), np.where(sd > 1e-9, sd, 1.0))

    def __call__(self, features: ArrayLike) -> Floats:
        """Standardise and clip (n, D) features."""
        return np.clip((np.asarray(features, np.float64) - self.mean) / self.sd, -CLIP, CLIP)


@dataclass(frozen=True)
class Reader:
    """A linear classifier of standardised features.

    Parameters
    ----------
    classes
        (K,) the classes, sorted.
    weights, bias
        (K, D) and (K,): the class of the highest score is the answer.
    """

    classes: NDArray[Any]
    weights: Floats
    bias: Floats

    @staticmethod
    def fit(features: ArrayLike, truth: ArrayLike) -> Reader:
        """Fit a ridge-penalised logistic regression with balanced classes to (n, D) features and (n,) classes."""
        model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000)
        model.fit(np.asarray(features), np.asarray(truth))
        weights, bias = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # scikit-learn keeps the second class alone
            weights, bias = np.vstack([-weights, weights]), np.concatenate([-bias, bias])
        return Reader(model.classes_, weights, bias)

    def __call__(self, features: ArrayLike) -> NDArray[Any]:
        """Return the answer for each row."""
        return np.asarray(self.classes[(np.asarray(features) @ self.weights.T + self.bias).argmax(1)])

    def accuracy(self, features: ArrayLike, truth: ArrayLike) -> float:
        """Balanced accuracy of the answers; chance is 1 / classes."""
        truth, answers = np.asarray(truth), self(features)
        return float(np.mean([(answers[truth == one] == one).mean() for one in np.unique(truth)]))


def feature_distance(real: ArrayLike, predicted: ArrayLike, standard: Standard) -> float:
    """Kernel distance (KID's) of the features of real and predicted stains; 0 for one and the same distribution."""
    return metrics.kernel_distance(standard(real), standard(predicted))
