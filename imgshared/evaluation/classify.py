"""The classifier harness: how well is a label told from real, rebuilt and predicted stains, and from chromatin alone?

With `train_on` "test", classifiers are fitted and tested in grouped folds among the held-out cells, which the imputer
never saw; with "train", they learn from the imputer's training cells and are tested on the held-out; in a nested study
they do so in each of its folds. The classifiers are those of `matrix`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared import metrics
from imgshared.config import EvaluateConfig
from imgshared.data.panel import Panel
from imgshared.evaluation import controls
from imgshared.evaluation.collect import Part
from imgshared.evaluation.labels import (
    Label,
    grouped_folds,
    read_label,
    refuse_broken_folds,
    refuse_shared_groups,
)
from imgshared.evaluation.matrix import ACROSS, ARROW, BOTH, WITHIN, Case, Cells, Fit, Probabilities
from imgshared.types import InputError

CONTRASTS = (
    ("predicted", "real"),
    (f"real{ARROW}predicted", "real"),
    ("predicted", "chromatin"),
    (BOTH, f"chromatin + {ACROSS}"),  # of the same number of features: what the prediction adds to its source
    ("shared", "real"),
)
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
        AUROC of one input minus another's on the same cells (``predicted - real``, ...), with intervals.
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
    progress: Callable[[str], None] | None = None,
) -> Classified:
    """Run the harness.

    Parameters
    ----------
    test
        The held-out cells.
    turns
        (training cells of an imputer, rows of `test` that it never saw), a pair an imputer; none: classifiers learn in
        folds among the held-out cells.

    Raises
    ------
    InputError
        See `labels`: unknown label, one class, too few groups, groups on both sides.
    """
    fold = config.fold or config.group
    refuse_broken_folds(test.obs, config.group, fold)
    for train, rows_of in turns:
        for unit in {fold, config.group}:
            refuse_shared_groups(train.obs, test.obs.iloc[rows_of], unit)
    groups = test.obs[config.group].astype(str).to_numpy()
    rows: dict[str, list[Any]] = {
        name: [] for name in ("scores", "contrasts", "agreement", "controls", "probabilities")
    }
    notes: list[str] = []
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
                row = {"label": name, "marker": marker, "backend": backend}
                found: dict[str, Probabilities] = {}
                for learn, tests in case.routes(plan):
                    if progress:
                        progress(f"{name}: {marker} {' + '.join(learn)}, {backend}")
                    found |= case.probabilities(plan, learn, tests)
                tested = np.concatenate([fit.test for fit in plan])
                truth, at = np.concatenate([fit.truth for fit in plan]), groups[tested]
                rows["scores"] += _score(row, found, truth, at, config)
                rows["contrasts"] += _contrast(row, found, truth, at, config)
                rows["agreement"] += _agree(row, found, at, config)
                rows["controls"] += [{**row, "value": value} for value in controls.permute(case, plan)]
                rows["probabilities"] += _tables(row, found, label, test.obs.index[tested], truth)
    said = {name: pd.DataFrame(found) for name, found in rows.items() if name != "probabilities"}
    said["controls"] = controls.judge(said["controls"], said["scores"])
    tables = rows["probabilities"]
    return Classified(
        **said, probabilities=pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), notes=notes
    )


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
    row: dict[str, Any], found: dict[str, Probabilities], truth: Cells, groups: NDArray[Any], config: EvaluateConfig
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
    row: dict[str, Any], found: dict[str, Probabilities], truth: Cells, groups: NDArray[Any], config: EvaluateConfig
) -> list[dict[str, Any]]:
    """Paired: both inputs are scored on the same drawn groups."""
    rows = []
    for one, other in CONTRASTS:
        if one in found and other in found:
            a, b = (metrics.auroc(groups, truth, found[given]) for given in (one, other))
            gap = metrics.estimate(groups, lambda c, a=a, b=b: a(c) - b(c), metrics.SIGNED)  # type: ignore[misc]
            rows.append({**row, "contrast": f"{one} - {other}", **gap._asdict()})
    return rows


def _agree(
    row: dict[str, Any], found: dict[str, Probabilities], groups: NDArray[Any], config: EvaluateConfig
) -> list[dict[str, Any]]:
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
