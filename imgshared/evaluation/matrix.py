"""The classifier matrix: what a classifier of one label and stain learns from, and what it is then tested on.

Inputs are given by the same cells, so that every score compares with every other:

``real``, ``predicted``            the stain itself, and as it was predicted
``full``, ``shared``               the stain rebuilt from all of its latents, from its own shared latent
``chromatin``                      the source alone
``chromatin + predicted``          both side by side: does the prediction add anything to its source?
``real → predicted``               learnt from real, tested on predicted stains, and the reverse: are they exchangeable?
``swapped within label``, ``swapped``  the prediction of another cell of the same class, or of any cell: what is left
                                   when a prediction is not of its own cell
``marker mean``                    one picture for all cells, by features: must be at chance
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from imgshared.config import EvaluateConfig
from imgshared.data.panel import Panel
from imgshared.evaluation.cnn import cnn_probabilities
from imgshared.evaluation.collect import MEAN, Part

Cells = NDArray[np.intp]
Inputs = tuple[str, ...]
Probabilities = NDArray[np.float64]

WITHIN, ACROSS = "swapped within label", "swapped"
BOTH = "chromatin + predicted"
ARROW = " → "
_ALONE: tuple[Inputs, ...] = (("full",), ("shared",), ("chromatin",), (MEAN,))
_PAIRS: tuple[Inputs, ...] = (("chromatin", "predicted"), ("chromatin", WITHIN), ("chromatin", ACROSS))
MATRIX: dict[Inputs, tuple[Inputs, ...]] = {  # what is learnt from: what that classifier is tested on
    ("real",): (("real",), ("predicted",), (WITHIN,), (ACROSS,)),
    ("predicted",): (("predicted",), ("real",)),
    **{inputs: (inputs,) for inputs in (*_ALONE, *_PAIRS)},
}


@dataclass(frozen=True)
class Fit:
    """One classifier's cells.

    Parameters
    ----------
    source
        The part that is learnt from: the held-out cells themselves (of other groups), or the imputer's training cells.
    learn, classes
        Rows of `source`, and the class of each.
    test, truth
        Rows of the held-out part, and the class of each.
    """

    source: Part
    learn: Cells
    classes: Cells
    test: Cells
    truth: Cells


def name_of(learnt: Inputs, tested: Inputs) -> str:
    """Return what a classifier is called: its input, or what it learns from → what it is tested on."""
    names = " + ".join(learnt), " + ".join(tested)
    return names[0] if learnt == tested else ARROW.join(names)


@dataclass(frozen=True)
class Case:
    """A label told from one stain by one kind of classifier.

    Parameters
    ----------
    held
        The held-out cells.
    classes
        Number of classes of the label.
    """

    held: Part
    panel: Panel
    marker: str
    backend: str
    classes: int
    config: EvaluateConfig

    def routes(self, plan: Sequence[Fit]) -> Iterator[tuple[Inputs, list[Inputs]]]:
        """Yield (what is learnt from, what is tested) of the matrix where all parts hold the inputs."""
        for learn, tests in MATRIX.items():
            known = [t for t in tests if self._holds(self.held, t)]
            if known and all(self._holds(fit.source, learn) for fit in plan):
                yield learn, known

    def probabilities(self, plan: Sequence[Fit], learn: Inputs, tests: Sequence[Inputs]) -> dict[str, Probabilities]:
        """Class probabilities by classifier, (n, classes), of the test rows of every fit, one after the other."""
        found: list[list[Probabilities]] = [[] for _ in tests]
        for fit in plan:
            x = self._values(fit.source, learn, fit.learn, fit.classes)
            given = [self._values(self.held, t, fit.test, fit.truth) for t in tests]
            p = self._fit(x, fit.classes, np.concatenate(given))
            for each, part in zip(found, np.split(p, len(tests)), strict=True):
                each.append(part)
        return {name_of(learn, t): np.concatenate(each) for t, each in zip(tests, found, strict=True)}

    def _fit(self, train: NDArray[Any], truth: Cells, test: NDArray[Any]) -> Probabilities:
        config = self.config
        if self.backend == "cnn":
            kind = {"model": config.cnn, "epochs": config.cnn_epochs}
            return cnn_probabilities(train, truth, test, self.classes, seed=config.seed, **kind)  # type: ignore[arg-type]
        return feature_probabilities(train, truth, test, self.classes, config.seed)

    def _values(self, part: Part, inputs: Inputs, rows: Cells, classes: Cells) -> NDArray[Any]:
        """Return (n, F) features or (n, K, Y, X) crops of some rows, inputs side by side.

        Swapped predictions come from other rows of the same call, so that nothing passes between the sides of a fold.
        """
        found = []
        for given in inputs:
            array = self._kept(part)[self._key(given)]
            swapped = given in (WITHIN, ACROSS)
            source = rows[_swap(classes, given == WITHIN, self.config.seed)] if swapped else rows
            found.append(array[source, None] if self.backend == "cnn" else array[source])
        return np.concatenate(found, 1)

    def _holds(self, part: Part, inputs: Inputs) -> bool:
        return all(self._key(given) in self._kept(part) for given in inputs)

    def _kept(self, part: Part) -> dict[tuple[str, str], Any]:
        return part.crops if self.backend == "cnn" else part.features

    def _key(self, given: str) -> tuple[str, str]:
        if given in (WITHIN, ACROSS):
            return self.marker, "predicted"
        return (self.panel.chromatin if given == "chromatin" else self.marker), given


def feature_probabilities(
    train: NDArray[np.float32], truth: Cells, test: NDArray[np.float32], classes: int, seed: int = 0
) -> Probabilities:
    """Fit a standardised, ridge-penalised logistic regression with balanced classes; (m, classes) probabilities.

    A linear boundary carries over to new donors better than trees do, which learn the donors' brightness.
    """
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000, random_state=seed)
    )
    model.fit(np.clip(train, -1e4, 1e4), truth)
    probabilities = np.zeros((len(test), classes))
    probabilities[:, model.classes_] = model.predict_proba(np.clip(test, -1e4, 1e4))
    return probabilities


def _swap(classes: Cells, within: bool, seed: int) -> Cells:
    """Return whose prediction each cell is given: a random order of all cells, or of those of its class."""
    rng = np.random.default_rng(seed)
    if not within:
        return rng.permutation(len(classes))
    order = np.arange(len(classes))
    for one in np.unique(classes):
        mine = np.flatnonzero(classes == one)
        order[mine] = rng.permutation(mine)
    return order
