"""Answers what the classifier matrix asks: linear models one by one, networks together, nothing twice."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sklearn
import timm
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from imgshared.config import EvaluateConfig
from imgshared.evaluation import cnn
from imgshared.evaluation.jobs import Cells, Job, Probabilities, keys

Count = Callable[[str, int, int], None]
NAME = re.compile("[0-9a-f]{32}")  # of an answer, by what it depends on


def solve(jobs: Sequence[Job], config: EvaluateConfig, cache: Path | None, say: Count) -> list[list[Probabilities]]:
    """Return the class probabilities of each job's tests, (m, classes) each.

    Parameters
    ----------
    cache
        A folder of answers by content: what is known there is not computed again. Every answer is written at once, so
        that an interrupted study goes on; what no job of this call asks for is removed at its end.
    say
        Called with what is being done, how many jobs are done, and of how many.
    """
    names = keys(jobs, (config.seed, config.cnn, config.cnn_steps, *_tools()))
    known = {name: answers for name, job in zip(names, jobs, strict=True) if (answers := _read(cache, name, job))}
    wanted = {name: job for name, job in zip(names, jobs, strict=True) if name not in known}
    total = len(wanted) + len(known)

    def done(name: str, answers: list[Probabilities]) -> None:
        known[name] = answers
        _write(cache, name, answers)

    linear = [name for name, job in wanted.items() if job.backend == "features"]
    for name in linear:
        say("linear classifiers", len(known), total)
        job = wanted[name]
        x = np.concatenate([view.take() for view in job.tests])
        p = feature_probabilities(job.learn.take(), job.truth, x, job.classes, config.seed)
        done(name, np.split(p, np.cumsum([len(view) for view in job.tests])[:-1]))
    networks = [name for name, job in wanted.items() if job.backend == "cnn"]
    if networks:
        text = "networks"

        def heard(forecast: str) -> None:
            nonlocal text
            text = forecast
            say(text, len(known), total)

        def learnt(k: int, answers: list[Probabilities]) -> None:
            done(networks[k], answers)
            say(text, len(known), total)

        training = cnn.Training(config.cnn, config.cnn_steps, config.seed)
        cnn.fit_networks([wanted[name] for name in networks], training, done=learnt, say=heard)
    if cache is not None and cache.exists():
        for path in (*cache.glob("*.npy"), *cache.glob("*.partial")):
            if path.stem not in known and NAME.fullmatch(path.stem):  # no file of anyone else
                path.unlink()
    return [known[name] for name in names]


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


def _tools() -> tuple[str, ...]:
    """What else an answer depends on: the code and its libraries."""
    code = inspect.getsource(cnn) + inspect.getsource(feature_probabilities)
    return code, *(str(library.__version__) for library in (np, sklearn, timm, torch))


def _read(cache: Path | None, name: str, job: Job) -> list[Probabilities] | None:
    path = cache / f"{name}.npy" if cache is not None else None
    if path is None or not path.exists():
        return None
    lengths = [len(view) for view in job.tests]
    try:
        whole = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # cut short: computed again
    if whole.shape != (sum(lengths), job.classes):
        return None
    return np.split(whole, np.cumsum(lengths)[:-1])


def _write(cache: Path | None, name: str, answers: list[Probabilities]) -> None:
    if cache is None:
        return
    cache.mkdir(parents=True, exist_ok=True)
    beside = cache / f"{name}.partial"
    with beside.open("wb") as file:
        np.save(file, np.concatenate(answers))
    beside.replace(cache / f"{name}.npy")
