"""The nested study: every group is judged by an imputer, normaliser and classifiers that never saw it.

Outer folds hold whole groups out; in each, the run's configuration is trained again without them, and inner groups, of
the remaining ones, stop the training and choose its checkpoint. Nothing of a group is seen before it is judged.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from imgshared.build import build_measured
from imgshared.config import EvaluateConfig, Experiment
from imgshared.data.split import Split, column, make_split
from imgshared.data.store import CellStore
from imgshared.evaluation.collect import Progress
from imgshared.evaluation.guard import cohort, shared_groups
from imgshared.evaluation.judgeable import judgeable
from imgshared.evaluation.kept import Keeper
from imgshared.evaluation.labels import read_label
from imgshared.evaluation.place import refuse_place
from imgshared.evaluation.study import Study, check_columns, check_outputs, joined, look
from imgshared.prediction import Run, load_run, predict_cells
from imgshared.types import InputError

DONE = "done"  # a file in a fold's folder: its training came to its end
POLL_S = 1.0


def plan_folds(run: Run, store: CellStore, config: EvaluateConfig) -> list[Split]:
    """Return the outer folds with their inner groups, stratified by the first label.

    Raises
    ------
    InputError
        For fewer groups than folds, a store that did not train the run, or a class that some fold could not learn.
    """
    if store.data_hash != run.contract.data_hash:
        raise InputError(f"--refit trains {run.path} again, so it needs the store that trained it, not {store.path}")
    if run.experiment.ensemble:
        raise InputError(f"--refit trains one model a fold, and {run.path} is an ensemble: name one of its members")
    if config.allow_seen_groups:
        raise InputError("allow_seen_groups: a nested study judges every group by an imputer that never saw it anyway")
    if config.predictions is not None:
        raise InputError("predictions: a nested study predicts every group itself; leave it out")
    if config.train_on == "test":
        raise InputError("train_on=test: classifiers of a nested study learn from what taught their fold's model")
    check_columns(store.obs, config)
    check_outputs(run, config)
    wish = run.experiment.split
    values = column(store.obs, wish.by).astype(str).to_numpy()
    names = np.unique(values)
    if len(names) < max(config.folds, 3):
        raise InputError(
            f"{config.folds} folds need {max(config.folds, 3)} values of {wish.by!r}, there are {len(names)} "
            f"({', '.join(names[:6])}): train, inner and held-out groups must differ. Set folds lower, or split by "
            "another column"
        )
    label = read_label(store.obs, config.labels[0], config.label_values) if config.labels else None
    splitter = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed) if label else None
    codes = label.codes if label else np.zeros(len(values))
    pairs = (splitter or GroupKFold(config.folds)).split(values, codes, values)
    share = wish.val if isinstance(wish.val, float) else len(wish.val) / len(names)
    folds: list[Split] = []
    for _, held in pairs:
        test = sorted(set(values[held]))
        rest = ~np.isin(values, test)
        inner = max(share, 1 / len(names))  # some inner group must stop the training
        split = make_split(
            store.obs, by=wish.by, val=inner, test=test, stratify=wish.stratify, seed=wish.seed + len(folds)
        )
        train_or_inner, held_out = (np.isin(values, names) for names in ((*split.train, *split.val), test))
        shared_groups([store.obs[train_or_inner]], store.obs[held_out], config)
        _refuse_unstained(run, store, np.isin(values, split.train), len(folds) + 1)
        _refuse_unjudgeable(run, store, held, len(folds) + 1)
        for name in config.labels:
            _refuse_lacking(store, name, config, np.isin(values, split.train), rest, len(folds) + 1)
        folds.append(split)
    return folds


def fit_folds(
    run: Run,
    store: CellStore,
    out: Path,
    config: EvaluateConfig,
    train: Callable[[Experiment, Path, bool], None],
    only: Collection[int] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Train the imputers that are not there yet, all or some of them.

    Parameters
    ----------
    train
        Called with (experiment, run folder, whether to resume).
    only
        Folds, from 1 on; None: all.
    """
    refuse_place(out, run, store, config)
    folds = plan_folds(run, store, config)
    for k in only or ():
        if not 1 <= k <= len(folds):
            raise InputError(f"there is no fold {k}: folds count from 1 to {len(folds)}")
    for k, split in enumerate(folds, 1):
        folder = _folder(out, k)
        if only is not None and k not in only:
            continue
        wish = _experiment(run, split)
        if (folder / DONE).exists():
            _refuse_other(load_run(folder), wish, store)
            continue
        progress(f"fold {k} of {len(folds)}", k - 1, len(folds) + 1)  # the last part of a study is its judgement
        train(wish, folder, (folder / "config.yaml").exists())
        (folder / DONE).touch()


def await_folds(out: Path, folds: int) -> None:
    """Wait until other processes have trained their folds; where one of them fails, torchrun ends all."""
    while not all((_folder(out, k) / DONE).exists() for k in range(1, folds + 1)):
        time.sleep(POLL_S)


def nested(
    run: Run, store: CellStore, out: Path, config: EvaluateConfig, say: Progress, keeper: Keeper | None
) -> Study:
    """Look at every group's cells through the imputer of its fold.

    Raises
    ------
    InputError
        Where a fold's training is of another plan: other folds, groups, seed or settings.
    """
    config = dataclasses.replace(config, train_on="train")
    looks = []
    for k, split in enumerate(plan_folds(run, store, config), 1):
        imputer = load_run(_folder(out, k))
        _refuse_other(imputer, _experiment(run, split), store)
        who = cohort(imputer, store, config)
        looks.append(look(imputer, store, who, config, predict_cells, say, keeper, f"fold {k}: "))
    return joined(store, config, looks)


def _experiment(run: Run, split: Split) -> Experiment:
    """What a fold trains: the run's configuration on the groups that the fold leaves it."""
    wish = dataclasses.replace(run.experiment.split, val=split.val, test=split.test)
    return dataclasses.replace(run.experiment, split=wish)


def _refuse_other(imputer: Run, wish: Experiment, store: CellStore) -> None:
    """Refuse a fold that another study has left."""
    ours = imputer.experiment
    broken = [
        (ours.split != wish.split, f"for other folds (it held out {', '.join(imputer.split.test)})"),
        (dataclasses.replace(ours, split=wish.split) != wish, "with other settings"),
        (imputer.contract.data_hash != store.data_hash, f"on other cells than {store.path} holds now"),
    ]
    for differs, told in broken:
        if differs:
            raise InputError(f"{imputer.path} was trained {told}: choose another folder (--out), or remove it")


def _folder(out: Path, k: int) -> Path:
    return out / "folds" / f"fold_{k}"


def _refuse_unstained(run: Run, store: CellStore, train: NDArray[np.bool_], k: int) -> None:
    """Refuse a marker that no training group of a fold shows: its imputer could not be trained."""
    shown = build_measured(run.experiment, store, run.panel)[train].any(0)
    for marker in np.asarray(run.panel.markers)[~shown]:
        raise InputError(
            f"{marker} is measured in no training group of fold {k}, so that no model could learn it: use fewer "
            "folds, or more groups with this marker"
        )


def _refuse_unjudgeable(run: Run, store: CellStore, held: NDArray[np.intp], k: int) -> None:
    """Refuse a fold that holds out nothing that could be judged, before anything is trained."""
    try:
        judgeable(run, store, held)
    except InputError as error:
        raise InputError(f"fold {k} of {len(held):,} cells: {error}. Or use fewer folds") from error


def _refuse_lacking(
    store: CellStore, name: str, config: EvaluateConfig, train: NDArray[np.bool_], rest: NDArray[np.bool_], k: int
) -> None:
    """Refuse a label of which a fold could not learn every class: hours of training would end in nothing."""
    label = read_label(store.obs, name, config.label_values)
    for place, rows in (("remaining", rest), ("training", train)):
        absent = set(range(len(label.classes))) - set(label.codes[rows])
        if absent:
            raise InputError(
                f"label {name!r}: class {label.classes[min(absent)]!r} is in no {place} group of fold {k}. A class "
                "that too few groups hold cannot be told from the groups: no honest split exists. Use fewer folds, "
                "more groups, or split.stratify"
            )
