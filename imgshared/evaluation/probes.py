"""Latent probes: how well is each label and known factor read by a linear model from each shared and specific latent?

Fitted on the run's training cells, tested on held-out groups. A factor that only one stain shows should be read from
that stain's specific latent and not from the shared one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from imgshared import metrics
from imgshared.config import EvaluateConfig
from imgshared.evaluation.collect import Part
from imgshared.evaluation.labels import read_factor, read_label
from imgshared.evaluation.solve import feature_probabilities

LEAST = 10  # cells on either side
ALPHAS = tuple(np.logspace(-1, 4, 11))


def probe(
    train: Part, test: Part, config: EvaluateConfig, progress: Callable[[str], None] | None = None
) -> pd.DataFrame:
    """Read every label (logistic regression) and factor (ridge) from every latent.

    Returns
    -------
    One row a latent x target x score: ``latent``, ``target``, ``score`` (``auroc`` and ``balanced_accuracy`` of a
    label, ``r2`` of a factor), ``value``, ``low``, ``high`` (over test groups), ``cells``, ``groups``. Latents are
    scaled by the training cells alone; the ridge's strength is chosen by folds over training groups. A pair with fewer
    than ten cells on a side, or a constant factor, is left out.

    Raises
    ------
    InputError
        For an unknown column, or a label with one class. That no group is on both sides is the guard's to see to.
    """
    rows: list[dict[str, Any]] = []
    for name in config.labels:
        label = read_label(test.obs, name, config.label_values)
        known = read_label(train.obs, name, label.classes)
        if known.classes != label.classes:
            continue  # the harness has its own say on it; a probe cannot name a class that it never saw
        for latent in test.latents:
            if progress:
                progress(f"{latent} to {name}")
            a, b = (_known(part, latent, truth.codes >= 0) for part, truth in ((train, known), (test, label)))
            if min(len(a), len(b)) >= LEAST and set(known.codes[a]) == set(range(len(label.classes))):
                p = feature_probabilities(
                    train.latents[latent][a], known.codes[a], test.latents[latent][b], len(label.classes), config.seed
                )
                groups, truth = _groups(test, b, config), label.codes[b]
                both = {
                    "auroc": metrics.auroc(groups, truth, p),
                    "balanced_accuracy": metrics.balanced_accuracy(groups, truth, p.argmax(1)),
                }
                rows += [_row(latent, name, score, statistic, groups, config) for score, statistic in both.items()]
    for name in config.factors:
        y_train, y_test = read_factor(train.obs, name), read_factor(test.obs, name)
        for latent in test.latents:
            a, b = _known(train, latent, ~np.isnan(y_train)), _known(test, latent, ~np.isnan(y_test))
            if min(len(a), len(b)) >= LEAST and np.ptp(y_train[a]) > 0 and np.ptp(y_test[b]) > 0:
                guess = _ridge(train.latents[latent][a], y_train[a], _groups(train, a, config), test.latents[latent][b])
                groups = _groups(test, b, config)
                rows.append(_row(latent, name, "r2", metrics.r2(groups, y_test[b], guess), groups, config))
    return pd.DataFrame(rows)


def _ridge(
    x: NDArray[np.float32], y: NDArray[np.float64], groups: NDArray[Any], x_test: NDArray[np.float32]
) -> NDArray[np.float64]:
    units = len(np.unique(groups))
    folds = list(GroupKFold(min(units, 4)).split(x, y, groups)) if units > 1 else []
    model = make_pipeline(StandardScaler(), RidgeCV(ALPHAS, cv=folds) if folds else Ridge(100.0)).fit(x, y)
    return np.asarray(model.predict(x_test), np.float64)


def _known(part: Part, latent: str, wanted: NDArray[np.bool_]) -> NDArray[np.intp]:
    return np.flatnonzero(wanted & np.isfinite(part.latents[latent]).all(1))


def _groups(part: Part, cells: NDArray[np.intp], config: EvaluateConfig) -> NDArray[Any]:
    return part.obs[config.group].astype(str).to_numpy()[cells]


def _row(
    latent: str, target: str, score: str, statistic: metrics.Statistic, groups: NDArray[Any], config: EvaluateConfig
) -> dict[str, Any]:
    value = metrics.estimate(groups, statistic, (0.0 if score != "r2" else -np.inf, 1.0))
    counts = {"cells": len(groups), "groups": len(np.unique(groups))}
    return {"latent": latent, "target": target, "score": score, **value._asdict(), **counts}
