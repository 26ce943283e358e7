"""Controls of the classifier harness: what must be at chance, or the study is unsound."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from imgshared import metrics
from imgshared.evaluation.collect import MEAN, Part
from imgshared.evaluation.jobs import Cells, Job, Probabilities
from imgshared.evaluation.labels import permuted
from imgshared.evaluation.matrix import Case, Fit

COUNT = {"features": 10, "cnn": 1}  # times that labels are permuted, for each stain
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
    """Yield `COUNT` controls by permuted labels; fewer where a fold would lack a class."""
    count, seed = COUNT[case.backend], case.config.seed
    if ("real",) not in dict(case.routes(plan)):
        return
    rows, truth = (np.concatenate([getattr(fit, name) for fit in plan]) for name in ("test", "truth"))
    tested = _trade(case, case.held, rows, truth, count, seed)
    learnt = [
        tested if fit.source is case.held else _trade(case, fit.source, fit.learn, fit.classes, count, seed + 1 + i)
        for i, fit in enumerate(plan)
    ]
    for k in range(min(len(tested), *map(len, learnt))):
        turned = [
            dataclasses.replace(fit, classes=mine[k][fit.learn], truth=tested[k][fit.test])
            for fit, mine in zip(plan, learnt, strict=True)
        ]
        if all(len(np.unique(fit.classes)) == case.classes for fit in turned):
            jobs = case.jobs(turned, ("real",), [("real",)])
            yield Control(jobs, np.concatenate([fit.truth for fit in turned]))


def judge(permutations: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row a label x backend x control: `value` (AUROC), `low`, `high`, and whether it is `sound`.

    Permuted labels: the mean over stains and permutations, its interval that of the mean. The marker mean: the stain
    with the highest AUROC. Grouped folds push permuted labels below 0.5 rather than above it: below is sound.
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
        worst = max(part.to_dict("records"), key=lambda row: float(row["value"]))
        rows.append(
            {"label": label, "backend": backend, "control": MEAN, **{k: worst[k] for k in ("value", "low", "high")}}
        )
    table = pd.DataFrame(rows)
    if len(table):
        table["sound"] = (table["value"] <= 0.5 + CHANCE) | (table["low"] <= 0.5)
    return table


def _trade(case: Case, part: Part, rows: Cells, codes: Cells, count: int, seed: int) -> list[Cells]:
    """Permute the labels of some rows; returned by row of the part, -1 for the others."""
    unit = case.config.fold or case.config.group
    groups = part.obs[unit].astype(str).to_numpy()[rows]
    traded = []
    for new in permuted(codes, groups, count, seed):
        every = np.full(len(part.cells), -1)
        every[rows] = new
        traded.append(every)
    return traded
