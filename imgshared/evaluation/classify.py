"""The classifier harness: how well is a label told from real, rebuilt and predicted stains, and from chromatin alone?

For each label and protein, every input is given by the same cells (those where the protein is measured), so that the
scores compare. With `train_on` "test", classifiers are fitted and tested in grouped folds among the held-out cells,
which the imputer never saw; with "train", they learn from the imputer's training cells and are tested on the held-out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from imgshared import metrics
from imgshared.config import EvaluateConfig
from imgshared.data.panel import Panel
from imgshared.evaluation.cnn import cnn_probabilities
from imgshared.evaluation.collect import INPUTS, Part
from imgshared.evaluation.labels import Label, grouped_folds, read_label, refuse_broken_folds, refuse_shared_groups
from imgshared.types import InputError

Cells = NDArray[np.intp]
CONTRASTS = (("predicted", "real"), ("predicted", "chromatin"), ("shared", "real"))


def classify(
    test: Part, train: Part | None, panel: Panel, config: EvaluateConfig, progress: Callable[[str], None] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, list[str]]:
    """Run the harness.

    Parameters
    ----------
    test, train
        The held-out cells, and the imputer's training cells where `config.train_on` is "train".

    Returns
    -------
    scores
        One row a label x marker x input x backend x score (``auroc``, ``balanced_accuracy``): value, low, high, cells,
        groups.
    contrasts
        AUROC of one input minus another's on the same cells (``predicted - real``, ...), with intervals.
    probabilities
        One row a cell x label x marker x input x backend: truth and ``p_<class>``.
    notes
        What was left out and why, in words.

    Raises
    ------
    InputError
        See `labels`: unknown label, one class, too few groups, groups on both sides.
    """
    fold = config.fold or config.group
    refuse_broken_folds(test.obs, config.group, fold)
    if train is not None:
        for unit in {fold, config.group}:
            refuse_shared_groups(train.obs, test.obs, unit)
    groups = test.obs[config.group].astype(str).to_numpy()
    scores: list[dict[str, Any]] = []
    contrasts: list[dict[str, Any]] = []
    probabilities: list[pd.DataFrame] = []
    notes: list[str] = []
    for name in config.labels:
        label = read_label(test.obs, name, config.label_values)
        notes += _dropped(label)
        _plan(label, np.flatnonzero(label.codes >= 0), test, train, None, config)  # refuse a hopeless label early
        for marker in panel.proteins:
            channel = panel.index(marker)
            cells = np.flatnonzero(_usable(label.codes, test, channel, panel))
            try:
                plan = _plan(label, cells, test, train, (channel, panel), config)
            except InputError as error:
                notes.append(f"{name} from {marker}: left out ({error})")
                continue
            for backend in config.classifiers:
                found: dict[str, NDArray[np.float64]] = {}
                for given, x_test, x_train in _inputs(test, train, panel, marker, backend):
                    if progress:
                        progress(f"{name}: {marker} {given}, {backend}")
                    found[given] = _predict(plan, x_train, x_test, label, backend, config)
                tested = np.concatenate([t for _, _, t in plan])
                row = {"label": name, "marker": marker, "backend": backend}
                scores += _score(row, found, label.codes[tested], groups[tested], config)
                contrasts += _contrast(row, found, label.codes[tested], groups[tested], config)
                probabilities += _tables(row, found, label, test.obs.index[tested], label.codes[tested])
    table = pd.concat(probabilities, ignore_index=True) if probabilities else pd.DataFrame()
    return pd.DataFrame(scores), pd.DataFrame(contrasts), table, notes


def feature_probabilities(
    train: NDArray[np.float32], truth: Cells, test: NDArray[np.float32], classes: int, seed: int = 0
) -> NDArray[np.float64]:
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


def _usable(codes: Cells, part: Part, channel: int, panel: Panel) -> NDArray[np.bool_]:
    return np.asarray((codes >= 0) & part.measured[:, channel] & part.measured[:, panel.chromatin_index])


def _plan(
    label: Label, cells: Cells, test: Part, train: Part | None, stain: tuple[int, Panel] | None, config: EvaluateConfig
) -> list[tuple[Cells, Cells, Cells]]:
    """Return (rows to learn from, their classes, test rows) of each fit."""
    present = set(label.codes[cells])
    if len(present) < 2:
        raise InputError(
            f"label {label.name!r} has one class among the {len(cells)} cells where the marker is measured"
        )
    if train is None:
        fold = config.fold or config.group
        units = test.obs[fold].astype(str).to_numpy()
        pairs = grouped_folds(label, cells, units, fold, config.folds, config.seed)
        return [(learn, label.codes[learn], held) for learn, held in pairs]
    known = read_label(train.obs, label.name, label.classes)
    absent = [c for c in label.classes if c not in known.classes]
    if absent:
        raise InputError(f"label {label.name!r}: class {absent[0]!r} is in no training cell of the run")
    usable = known.codes >= 0 if stain is None else _usable(known.codes, train, *stain)
    learn = np.flatnonzero(usable)
    if set(known.codes[learn]) != set(range(len(label.classes))):
        raise InputError(f"label {label.name!r}: some class has no training cell where the marker is measured")
    return [(learn, known.codes[learn], cells)]


def _inputs(
    test: Part, train: Part | None, panel: Panel, marker: str, backend: str
) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Yield (input, test values, values to learn from) of a marker."""
    for given in INPUTS:
        key = (panel.chromatin if given == "chromatin" else marker, given)
        seen = test.crops if backend == "cnn" else test.features
        learnt = seen if train is None else (train.crops if backend == "cnn" else train.features)
        if key in seen and key in learnt:
            yield given, seen[key], learnt[key]


def _predict(
    plan: list[tuple[Cells, Cells, Cells]],
    x_train: NDArray[Any],
    x_test: NDArray[Any],
    label: Label,
    backend: str,
    config: EvaluateConfig,
) -> NDArray[np.float64]:
    """Class probabilities of the test rows of every fold, one after the other."""
    k = len(label.classes)
    if backend == "cnn":
        kind = {"model": config.cnn, "epochs": config.cnn_epochs}
        found = [
            cnn_probabilities(x_train[a, None], y, x_test[b, None], k, seed=config.seed, **kind)  # type: ignore[arg-type]
            for a, y, b in plan
        ]
    else:
        found = [feature_probabilities(x_train[a], y, x_test[b], k, config.seed) for a, y, b in plan]
    return np.concatenate(found)


def _score(
    row: dict[str, Any],
    found: dict[str, NDArray[np.float64]],
    truth: Cells,
    groups: NDArray[Any],
    config: EvaluateConfig,
) -> list[dict[str, Any]]:
    rows = []
    for given, p in found.items():
        both = {
            "auroc": metrics.auroc(groups, truth, p),
            "balanced_accuracy": metrics.balanced_accuracy(groups, truth, p.argmax(1)),
        }
        for score, statistic in both.items():
            value = metrics.estimate(groups, statistic, config.bootstrap, config.seed)
            counts = {"cells": len(truth), "groups": len(np.unique(groups)), "classes": p.shape[1]}
            rows.append({**row, "input": given, "score": score, **value._asdict(), **counts})
    return rows


def _contrast(
    row: dict[str, Any],
    found: dict[str, NDArray[np.float64]],
    truth: Cells,
    groups: NDArray[Any],
    config: EvaluateConfig,
) -> list[dict[str, Any]]:
    """Paired: both inputs are scored on the same drawn groups."""
    rows = []
    for one, other in CONTRASTS:
        if one in found and other in found:
            a, b = (metrics.auroc(groups, truth, found[given]) for given in (one, other))
            gap = metrics.estimate(groups, lambda c, a=a, b=b: a(c) - b(c), config.bootstrap, config.seed)  # type: ignore[misc]
            rows.append({**row, "contrast": f"{one} - {other}", **gap._asdict()})
    return rows


def _tables(
    row: dict[str, Any], found: dict[str, NDArray[np.float64]], label: Label, cell_ids: pd.Index[Any], truth: Cells
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
