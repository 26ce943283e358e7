"""The classifier matrix: what a classifier of one label and stain learns from, and what it is then tested on.

Inputs are given by the same cells, so that every score compares with every other:

``real``, ``predicted``            the stain itself, and as it was predicted
``full``, ``shared``               the stain rebuilt from all of its latents, from its own shared latent
``chromatin``                      the source alone
``chromatin + predicted``          both side by side: does the prediction add anything to its source?
``real → predicted``               learnt from real, tested on predicted stains, and the reverse: are they exchangeable?
``swapped within label``, ``swapped``  the prediction of another cell of the same class, or of any cell: what is left
                                   when a prediction is not of its own cell
``marker mean``                    one picture for all cells: must be at chance
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imgshared.config import EvaluateConfig
from imgshared.data.panel import Panel
from imgshared.evaluation.collect import MEAN, Part
from imgshared.evaluation.jobs import Cells, Job, View

Inputs = tuple[str, ...]

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

    def jobs(self, plan: Sequence[Fit], learn: Inputs, tests: Sequence[Inputs]) -> list[Job]:
        """Return what is to be trained: one job a fit, tested on all of `tests`."""
        unit = self.config.fold or self.config.group
        return [
            Job(
                self.backend,
                self._view(fit.source, learn, fit.learn, fit.classes),
                fit.classes,
                np.unique(fit.source.obs[unit].astype(str).to_numpy()[fit.learn], return_inverse=True)[1],
                tuple(self._view(self.held, t, fit.test, fit.truth) for t in tests),
                self.classes,
            )
            for fit in plan
        ]

    def _view(self, part: Part, inputs: Inputs, rows: Cells, classes: Cells) -> View:
        """Some cells of a part, inputs side by side.

        Swapped predictions come from other rows of the same call, so that nothing passes between the sides of a fold.
        """
        arrays, taken = [], []
        for given in inputs:
            arrays.append(self._kept(part)[self._key(given)])
            swapped = given in (WITHIN, ACROSS)
            taken.append(rows[_swap(classes, given == WITHIN, self.config.seed)] if swapped else rows)
        return View(tuple(arrays), tuple(taken))

    def _holds(self, part: Part, inputs: Inputs) -> bool:
        return all(self._key(given) in self._kept(part) for given in inputs)

    def _kept(self, part: Part) -> dict[tuple[str, str], Any]:
        return part.crops if self.backend == "cnn" else part.features

    def _key(self, given: str) -> tuple[str, str]:
        if given in (WITHIN, ACROSS):
            return self.marker, "predicted"
        return (self.panel.chromatin if given == "chromatin" else self.marker), given


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
