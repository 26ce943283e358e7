"""Controls of the classifier harness: what must be at chance, or the study is unsound."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from imgshared import metrics
from imgshared.evaluation.collect import MEAN
from imgshared.evaluation.jobs import Cells, Job, Probabilities
from imgshared.evaluation.labels import permuted
from imgshared.evaluation.matrix import Case, Fit

COUNT = {"features": 10, "cnn": 3}  # times that labels are permuted, for each stain
PERMUTATION = "labels permuted across groups"
CHANCE = 0.05  # AUROC above 0.5 that a control may reach


@dataclass(frozen=True)
class Control:
    """Classifiers that learn permuted labels from real stains and are tested on permuted labels.

    Parameters
    ----------
    jobs, truth
        A job a fit; the permuted classes of their tests, one after another.
    """

    jobs: list[Job]
    truth: Cells

    def auroc(self, answers: Iterator[list[Probabilities]]) -> float:
        """Return the AUROC, given each job's answers in turn."""
        p = np.concatenate([next(answers)[0] for _ in self.jobs])
        return float(metrics.auroc(np.zeros(len(self.truth)), self.truth, p)(np.ones((1, 1)))[0])


def permute(case: Case, plan: Sequence[Fit]) -> Iterator[Control]:
    """Yield `COUNT` controls by permuted labels; fewer where a fold would lack a class.

    Labels are traded once for all cells, learnt from and tested: whatever is on both sides, a group or a cell, bears
    the same traded label there, so that a classifier that knows it again is found out.
    """
    if ("real",) not in dict(case.routes(plan)):
        return
    sides = [side for fit in plan for side in ((fit.source, fit.learn), (case.held, fit.test))]
    codes = np.concatenate([c for fit in plan for c in (fit.classes, fit.truth)])
    unit = case.config.fold or case.config.group
    groups = np.concatenate([part.obs[unit].astype(str).to_numpy()[rows] for part, rows in sides])
    names = np.concatenate([part.obs.index.astype(str).to_numpy()[rows] for part, rows in sides])
    _, first, at = np.unique(groups + "\n" + names, return_index=True, return_inverse=True)
    ends = np.cumsum([len(rows) for _, rows in sides])[:-1]
    held = np.zeros(len(first), bool)
    held[np.concatenate(np.split(at, ends)[1::2])] = True
    views = [held] if held.all() else [held, ~held]  # cells that are only learnt from are to tell little, too
    for new in permuted(codes[first], groups[first], COUNT[case.backend], case.config.seed, views):
        traded = np.split(new[at], ends)
        turned = [
            dataclasses.replace(fit, classes=traded[2 * k], truth=traded[2 * k + 1]) for k, fit in enumerate(plan)
        ]
        if all(len(np.unique(fit.classes)) == case.classes for fit in turned):
            jobs = case.jobs(turned, ("real",), [("real",)])
            yield Control(jobs, np.concatenate([fit.truth for fit in turned]))


def judge(permutations: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row a label x backend x control: `value` (AUROC), `low`, `high`, and whether it is `sound`.

    Permuted labels: the mean over stains and permutations, its interval that of the mean. The marker mean: a stain
    that is not sound before others, then the one with the highest AUROC. Grouped folds push permuted labels below 0.5
    rather than above it: below is sound.
    """
    rows = []
    keys = ["label", "backend"]
    for (label, backend), part in permutations.groupby(keys, sort=False) if len(permutations) else ():
        x = part["value"].to_numpy(float)
        half = 1.96 * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.nan
        value = {"value": x.mean(), "low": x.mean() - half, "high": x.mean() + half}
        rows.append({"label": label, "backend": backend, "control": PERMUTATION, **value})
    means = scores[(scores["input"] == MEAN) & (scores["score"] == "auroc")] if len(scores) else scores
    for (label, backend), part in means.groupby(keys, sort=False) if len(means) else ():
        worst = max(part.to_dict("records"), key=lambda row: (not _sound(row["value"], row["low"]), row["value"]))
        rows.append(
            {"label": label, "backend": backend, "control": MEAN, **{k: worst[k] for k in ("value", "low", "high")}}
        )
    table = pd.DataFrame(rows)
    if len(table):
        table["sound"] = [_sound(*row) for row in zip(table["value"], table["low"], strict=True)]
    return table


def _sound(value: float, low: float) -> bool:
    """At chance, or not told from it."""
    return bool(value <= 0.5 + CHANCE or low <= 0.5)
