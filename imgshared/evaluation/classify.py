"""The classifier harness: how well is a label told from real, rebuilt and predicted stains, and from chromatin alone?

With `train_on` "test", classifiers are fitted and tested in grouped folds among the held-out cells, which the imputer
never saw; with "train", they learn from the imputer's training cells and are tested on the held-out; in a nested study
they do so in each of its folds. The classifiers are those of `matrix`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared import metrics
from imgshared.config import EvaluateConfig
from imgshared.data.panel import Panel
from imgshared.evaluation import controls
from imgshared.evaluation.collect import Part
from imgshared.evaluation.jobs import Cells, Job, Probabilities
from imgshared.evaluation.labels import (
    Label,
    grouped_folds,
    read_label,
    refuse_broken_folds,
    refuse_shared_groups,
)
from imgshared.evaluation.matrix import ACROSS, ARROW, BOTH, WITHIN, Case, Fit, Inputs, name_of
from imgshared.evaluation.solve import solve
from imgshared.types import InputError

CONTRASTS = (
    ("predicted", "real"),
    (f"real{ARROW}predicted", "real"),
    ("predicted", "chromatin"),
    (BOTH, f"chromatin + {ACROSS}"),  # of the same number of features: what the prediction adds to its source
    ("shared", "real"),
)
SHARE = "share of real above chance"  # (AUROC of predicted - 0.5) / (AUROC of real - 0.5)
Turn = tuple[Part, Cells]
ANSWERED = {"predicted": f"real{ARROW}predicted", WITHIN: f"real{ARROW}{WITHIN}", ACROSS: f"real{ARROW}{ACROSS}"}


@dataclass
class Classified:
    """What the harness found.

    Parameters
    ----------
    scores
        One row a label x marker x input x backend x score (``auroc``, ``balanced_accuracy``): value, low, high, cells,
        groups, classes. What `input` may be: see `matrix`.
    contrasts
        AUROC of one input minus another's on the same cells (``predicted - real``, ...), and `SHARE`, with intervals.
    agreement
        Cohen's kappa of the answers that the classifier of real stains gives on the real and on the `predicted` (or
        swapped) stain of the same cells, with intervals.
    controls
        One row a label x backend x control: `value` (AUROC), `low`, `high`, and whether it is `sound`: at chance.
    probabilities
        One row a cell x label x marker x input x backend: truth and ``p_<class>``.
    notes
        What was left out and why, in words.
    """

    scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    contrasts: pd.DataFrame = field(default_factory=pd.DataFrame)
    agreement: pd.DataFrame = field(default_factory=pd.DataFrame)
    controls: pd.DataFrame = field(default_factory=pd.DataFrame)
    probabilities: pd.DataFrame = field(default_factory=pd.DataFrame)
    notes: list[str] = field(default_factory=list)


def classify(
    test: Part,
    turns: Sequence[Turn],
    panel: Panel,
    config: EvaluateConfig,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    cache: Path | None = None,
) -> Classified:
    """Run the harness.

    Parameters
    ----------
    test
        The held-out cells.
    turns
        (training cells of an imputer, rows of `test` that it never saw), a pair an imputer; none: classifiers learn in
        folds among the held-out cells.
    cache
        See `solve.solve`.

    Raises
    ------
    InputError
        See `labels`: unknown label, one class, too few groups, groups on both sides (unless `config` allows it).
    """
    fold = config.fold or config.group
    if not turns and config.labels:
        refuse_broken_folds(test.obs, config.group, fold)
    for train, rows_of in turns if not config.allow_seen_groups else ():
        for unit in {fold, config.group}:
            refuse_shared_groups(train.obs, test.obs.iloc[rows_of], unit)
    groups = test.obs[config.group].astype(str).to_numpy()
    asked, notes = _ask(test, turns, panel, config)
    answers = iter(solve([job for question in asked for job in question.jobs], config, cache, progress))
    rows: dict[str, list[Any]] = {
        name: [] for name in ("scores", "contrasts", "agreement", "controls", "probabilities")
    }
    for question in asked:
        found = question.found(answers)
        row, plan = question.row, question.plan
        tested = np.concatenate([fit.test for fit in plan])
        truth, at = np.concatenate([fit.truth for fit in plan]), groups[tested]
        rows["scores"] += _score(row, found, truth, at)
        rows["contrasts"] += _contrast(row, found, truth, at)
        rows["agreement"] += _agree(row, found, at)
        rows["controls"] += [{**row, "value": control.auroc(answers)} for control in question.controls]
        rows["probabilities"] += _tables(row, found, question.label, test.obs.index[tested], truth)
    said = {name: pd.DataFrame(found) for name, found in rows.items() if name != "probabilities"}
    said["controls"] = controls.judge(said["controls"], said["scores"])
    tables = rows["probabilities"]
    return Classified(
        **said, probabilities=pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), notes=notes
    )


@dataclass(frozen=True)
class _Question:
    """All classifiers of one label, marker and backend.

    Parameters
    ----------
    routes
        What is learnt from, what that is tested on, and a job a fit.
    controls
        The same with permuted labels.
    """

    row: dict[str, Any]
    label: Label
    plan: list[Fit]
    routes: list[tuple[Inputs, list[Inputs], list[Job]]]
    controls: list[controls.Control]

    @property
    def jobs(self) -> list[Job]:
        """In the order in which `found` and then the controls take their answers."""
        own = [job for _, _, jobs in self.routes for job in jobs]
        return own + [job for control in self.controls for job in control.jobs]

    def found(self, answers: Iterator[list[Probabilities]]) -> dict[str, Probabilities]:
        """Class probabilities by classifier, (n, classes), of the test rows of every fit, one after the other."""
        return {
            name_of(learn, given): np.concatenate(each)
            for learn, tests, jobs in self.routes
            for given, each in zip(tests, zip(*[next(answers) for _ in jobs], strict=True), strict=True)
        }


def _ask(test: Part, turns: Sequence[Turn], panel: Panel, config: EvaluateConfig) -> tuple[list[_Question], list[str]]:
    asked, notes = [], []
    for name in config.labels:
        label = read_label(test.obs, name, config.label_values)
        notes += _dropped(label)
        _plan(label, label.codes >= 0, test, turns, None, config)  # refuse a hopeless label early
        for marker in panel.proteins:
            channel = panel.index(marker)
            try:
                plan = _plan(label, _usable(label.codes, test, channel, panel), test, turns, (channel, panel), config)
            except InputError as error:
                notes.append(f"{name} from {marker}: left out ({error})")
                continue
            for backend in config.classifiers:
                case = Case(test, panel, marker, backend, len(label.classes), config)
                routes = [(learn, tests, case.jobs(plan, learn, tests)) for learn, tests in case.routes(plan)]
                row = {"label": name, "marker": marker, "backend": backend}
                asked.append(_Question(row, label, plan, routes, list(controls.permute(case, plan))))
    return asked, notes


def _usable(codes: Cells, part: Part, channel: int, panel: Panel) -> NDArray[np.bool_]:
    return np.asarray((codes >= 0) & part.measured[:, channel] & part.measured[:, panel.chromatin_index])


def _plan(
    label: Label,
    wanted: NDArray[np.bool_],
    test: Part,
    turns: Sequence[Turn],
    stain: tuple[int, Panel] | None,
    config: EvaluateConfig,
) -> list[Fit]:
    """Return who is learnt from and who is tested, fit by fit."""
    cells = np.flatnonzero(wanted)
    if len(set(label.codes[cells])) < 2:
        raise InputError(
            f"label {label.name!r} has one class among the {len(cells)} cells where the marker is measured"
        )
    if not turns:
        fold = config.fold or config.group
        units = test.obs[fold].astype(str).to_numpy()
        pairs = grouped_folds(label, cells, units, fold, config.folds, config.seed)
        return [Fit(test, learn, label.codes[learn], held, label.codes[held]) for learn, held in pairs]
    plan = []
    for train, rows in turns:
        known = read_label(train.obs, label.name, label.classes)
        absent = [c for c in label.classes if c not in known.classes]
        if absent:
            raise InputError(f"label {label.name!r}: class {absent[0]!r} is in no training cell of the run")
        learn = np.flatnonzero(known.codes >= 0 if stain is None else _usable(known.codes, train, *stain))
        if set(known.codes[learn]) != set(range(len(label.classes))):
            raise InputError(f"label {label.name!r}: some class has no training cell where the marker is measured")
        held = rows[wanted[rows]]
        if len(held):
            plan.append(Fit(train, learn, known.codes[learn], held, label.codes[held]))
    return plan


def _score(
    row: dict[str, Any], found: dict[str, Probabilities], truth: Cells, groups: NDArray[Any]
) -> list[dict[str, Any]]:
    rows = []
    for given, p in found.items():
        both = {
            "auroc": metrics.auroc(groups, truth, p),
            "balanced_accuracy": metrics.balanced_accuracy(groups, truth, p.argmax(1)),
        }
        for score, statistic in both.items():
            value = metrics.estimate(groups, statistic, metrics.SHARE)
            counts = {"cells": len(truth), "groups": len(np.unique(groups)), "classes": p.shape[1]}
            rows.append({**row, "input": given, "score": score, **value._asdict(), **counts})
    return rows


def _contrast(
    row: dict[str, Any], found: dict[str, Probabilities], truth: Cells, groups: NDArray[Any]
) -> list[dict[str, Any]]:
    """Paired: both inputs are scored on the same drawn groups."""
    rows = []
    for one, other in CONTRASTS:
        if one in found and other in found:
            a, b = (metrics.auroc(groups, truth, found[given]) for given in (one, other))
            gap = metrics.estimate(groups, lambda c, a=a, b=b: a(c) - b(c), metrics.SIGNED)  # type: ignore[misc]
            rows.append({**row, "contrast": f"{one} - {other}", **gap._asdict()})
    if "predicted" in found and "real" in found:
        a, b = (metrics.auroc(groups, truth, found[given]) for given in ("predicted", "real"))
        share = metrics.estimate(groups, partial(_share, a, b))
        rows.append({**row, "contrast": SHARE, **share._asdict()})
    return rows


def _share(one: metrics.Statistic, other: metrics.Statistic, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """One AUROC above chance over another; NaN where that is at chance."""
    above, whole = one(counts) - 0.5, other(counts) - 0.5
    return np.asarray(np.divide(above, whole, out=np.full(len(counts), np.nan), where=whole != 0))


def _agree(row: dict[str, Any], found: dict[str, Probabilities], groups: NDArray[Any]) -> list[dict[str, Any]]:
    real = found["real"].argmax(1)
    return [
        {**row, "prediction": given, **metrics.estimate(
            groups, metrics.kappa(groups, real, found[name].argmax(1)), metrics.SIGNED)._asdict()}
        for given, name in ANSWERED.items() if name in found
    ]  # fmt: skip


def _tables(
    row: dict[str, Any], found: dict[str, Probabilities], label: Label, cell_ids: pd.Index[Any], truth: Cells
) -> Iterator[pd.DataFrame]:
    for given, p in found.items():
        columns = {f"p_{c}": p[:, k] for k, c in enumerate(label.classes)}
        classes = np.array(label.classes)
        yield pd.DataFrame({"cell_id": cell_ids, **row, "input": given, "truth": classes[truth], **columns})


def _dropped(label: Label) -> list[str]:
    parts = [f"{label.missing} cells have no value" if label.missing else ""]
    parts.append(f"{label.other} cells have a value that was not asked for" if label.other else "")
    said = " and ".join(p for p in parts if p)
    return [f"{label.name}: {said}; left out of the classifiers"] if said else []
