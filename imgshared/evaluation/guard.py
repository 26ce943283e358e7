"""The leak guard: which cells may be judged, and what stands against believing the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared.config import EvaluateConfig
from imgshared.data.normalise import fit_normaliser
from imgshared.data.split import Split, column
from imgshared.data.store import CellStore
from imgshared.evaluation.given import Given
from imgshared.evaluation.judgeable import judgeable, with_sources
from imgshared.prediction import Run
from imgshared.types import InputError

SHOWN = 6  # group names in a message
COMPARED = 16  # cells whose pixels are compared with those of the training cells of their names
CHECKED = 2  # channels whose normaliser is fitted again: each ranks the pixels of thousands of crops


@dataclass(frozen=True)
class Cohort:
    """Who is judged, against whom.

    Parameters
    ----------
    source
        The store that holds the training cells: the judged one, or the one that trained the model.
    train, judged
        Rows of `source`, rows of the judged store; see `judgeable.with_sources` and `judgeable.judgeable`.
    unpredicted, bare
        Held-out cells that are not judged, see `judgeable.Judgeable`.
    leaks
        What the result may not be believed for, in sentences.
    cautions
        What the images themselves bring along, in sentences.
    """

    source: CellStore
    train: NDArray[np.intp]
    judged: NDArray[np.intp]
    unpredicted: int
    bare: int
    leaks: list[str]
    cautions: list[str]


def cohort(run: Run, store: CellStore, config: EvaluateConfig) -> Cohort:
    """Choose the cells to judge: of the held-out groups, and of groups that the run's split does not know.

    With `config.allow_seen_groups` all cells, and the leak is told.

    Raises
    ------
    InputError
        Where no group is unseen, a value of `config.group` is on both sides, stored predictions are of a model that has
        seen the judged groups, no training cell can be found, or no held-out cell can be judged.
    """
    parts = run.split.assign(store.obs)
    values = store.obs[run.split.by].astype(str).to_numpy()
    seen = np.isin(parts, ("train", "val"))
    judged = np.ones_like(seen) if config.allow_seen_groups else ~seen
    if not judged.any():
        raise InputError(
            f"{store.path}: the model has seen every {run.split.by} ({_some(values)}), so none is left to judge it by. "
            "Give a store with others, train with split.test set, or see what the seen ones would give with "
            "--allow-seen-groups, which marks every page as leaking"
        )
    leaks = []
    if (judged & seen).any():
        known = np.unique(values[judged & seen])
        leaks.append(
            f"{len(known)} of the {len(np.unique(values[judged]))} values of {run.split.by} that are judged have "
            f"trained the model or chosen its checkpoint ({_some(known)})"
        )
    elsewhere, doubts = _trained(run, store, config)
    leaks += shared_groups([store.obs[seen], *elsewhere], store.obs[judged & ~seen], config)
    leaks += _renamed(run, store, judged & ~seen, config)
    foreign, unknown = _author(run, store, judged, config)
    why = f"{store.path} holds no group that trained the run, and the floors need some; give a store with both"
    source = store if (parts == "train").any() else run.training_store(why)
    train = np.flatnonzero(run.split.assign(source.obs) == "train")
    leaks += [*_normaliser(run, source, train), *foreign]
    taught = with_sources(run, source, train)
    if not len(taught):
        raise InputError(
            f"{source.path}: none of the {len(train):,} training cells shows what the model predicts from, and the "
            "floors need some: give a store with such cells"
        )
    chosen = judgeable(run, store, np.flatnonzero(judged))
    cautions = [*_scaled(store), *doubts, *unknown, *_finer(store.obs.iloc[chosen.cells], config)]
    return Cohort(source, taught, *chosen, leaks, cautions)


def _trained(run: Run, store: CellStore, config: EvaluateConfig) -> tuple[list[pd.DataFrame], list[str]]:
    """Return obs of the cells that the model has seen in the store that trained it, where that is another; cautions."""
    others = [name for name in dict.fromkeys((config.group, "group")) if name != run.split.by]
    if not others or store.data_hash == run.contract.data_hash:
        return [], []
    try:
        obs = run.training_store("").obs
    except InputError:
        obs = None
    doubts = [
        f"whether the model has seen a {name} that is judged, in another {run.split.by}, is not known: the store that "
        f"trained it {'has changed or is not there' if obs is None else f'has no column {name!r}'}"
        for name in others
        if obs is None or name not in obs
    ]
    return ([] if obs is None else [obs[np.isin(run.split.assign(obs), ("train", "val"))]]), doubts


def _renamed(run: Run, store: CellStore, judged: NDArray[np.bool_], config: EvaluateConfig) -> list[str]:
    """Find cells that the model has seen and that stand in groups of other names now: by their names, then by pixels.

    Raises
    ------
    InputError
        Names the first, unless `config` allows it.
    """
    try:
        trained = run.training_store("")
    except InputError:
        return []  # `evaluate` says that groups are told apart by name alone
    seen = np.flatnonzero(np.isin(run.split.assign(trained.obs), ("train", "val")))
    rows = np.flatnonzero(judged)
    first = {str(name): int(k) for name, k in zip(trained.obs.index[seen][::-1], seen[::-1], strict=True)}
    both = [(int(k), first[str(name)]) for k, name in zip(rows, store.obs.index[rows], strict=True) if name in first]
    some = both[:: max(1, len(both) // COMPARED)]
    same = [pair for pair in some if _alike(store, trained, *pair)]
    if not same:
        return []
    (one, other), by = same[0], run.split.by
    old, new = (str(column(s.obs, by).iloc[k]) for s, k in ((trained, other), (store, one)))
    leak = (
        f"{store.obs.index[one]}, of {by} {new!r}, is a cell that the model has seen in training as one of {by} "
        f"{old!r} ({len(both):,} judged cells bear names of such cells)"
    )
    if not config.allow_seen_groups:
        raise InputError(
            f"{store.path}: {leak}: let groups bear the names that they had in training, or see what this would give "
            "with --allow-seen-groups"
        )
    return [leak]


def _alike(store: CellStore, trained: CellStore, one: int, other: int) -> bool:
    """Whether two cells show the same, pixel by pixel, in the markers that both stores hold."""
    shared = [m for m in store.markers if m in trained.markers]
    ours, theirs = (
        s.images(np.array([k]))[:, [s.markers.index(m) for m in shared]] for s, k in ((store, one), (trained, other))
    )
    return bool(shared) and np.array_equal(ours, theirs)


def _finer(judged: pd.DataFrame, config: EvaluateConfig) -> list[str]:
    """Tell of intervals over parts of groups, whose cells are alike."""
    if config.group == "group" or "group" not in judged:
        return []
    parts = judged[config.group].astype(str).groupby(judged["group"].astype(str).to_numpy()).nunique()
    if not (parts > 1).any():
        return []
    return [
        f"intervals are over {config.group}, of which a group has up to {parts.max()}: they are not independent of "
        "each other, so that intervals are too narrow; those over group are not"
    ]


def shared_groups(seen: Sequence[pd.DataFrame], judged: pd.DataFrame, config: EvaluateConfig) -> list[str]:
    """Find groups with cells on both sides of a split, as where it was split by image or by well; by obs of both.

    Raises
    ------
    InputError
        Names the first, unless `config` allows it.
    """
    leaks = []
    for name in dict.fromkeys((config.group, "group")):
        units = column(judged, name).astype(str)
        known = {unit for obs in seen if name in obs for unit in obs[name].astype(str)}
        both = sorted(known & set(units))
        if not both:
            continue
        leaks.append(f"{name} {both[0]!r} has cells on both sides of the run's split ({len(both)} in all)")
        if not config.allow_seen_groups:
            raise InputError(
                f"{leaks[-1]}: the model has seen the {name} that it would be judged by. Train with split.by={name}, "
                "choose another group column, or see what this would give with --allow-seen-groups"
            )
    return leaks


def _author(
    run: Run, store: CellStore, judged: NDArray[np.bool_], config: EvaluateConfig
) -> tuple[list[str], list[str]]:
    """Ask who made the stored predictions that are judged, and whom that model has seen: leaks and cautions."""
    if config.predictions is None:
        return [], []
    named = Given.open(config.predictions, sharp=config.sharp).info.get("run")
    author = Path(str(named)) if named else None
    if author == run.path.resolve():
        return [], []
    if author is None or not (author / "contract.json").is_file():
        told = f"which model made {config.predictions} is not known, nor whether it has seen the cells that are judged"
        return [], [told]
    split = Split.from_dict(json.loads((author / "contract.json").read_text())["split"])
    seen = judged & np.isin(split.assign(store.obs), ("train", "val"))
    if not seen.any():
        return [], []
    names = np.unique(column(store.obs, split.by).astype(str).to_numpy()[seen])
    leak = f"{config.predictions} was made by {author}, which was trained on {len(names)} of the groups that are judged"
    if not config.allow_seen_groups:
        raise InputError(
            f"{leak} ({_some(names)}): evaluate that run itself, predict by a run that held them out, or see what this "
            "would give with --allow-seen-groups"
        )
    return [f"{leak} ({_some(names)})"], []


def _normaliser(run: Run, source: CellStore, train: NDArray[np.intp]) -> list[str]:
    """Fit the normaliser again on the training groups alone; only where the store is the one that trained."""
    if source.data_hash != run.contract.data_hash:
        return []
    markers, c = run.panel.markers[:CHECKED], run.experiment.normalise
    channels = source.panel.indices(markers)
    measured = source.measured[np.ix_(train, np.asarray(channels))]
    groups = source.obs[run.split.by].astype(str).to_numpy()[train]
    for k, marker in enumerate(markers):
        measured[np.isin(groups, run.experiment.unstained.get(marker, ())), k] = False
    again = fit_normaliser(
        source, train, channels, measured,
        transform=c.transform, cofactor=c.cofactor, low=c.low, high=c.high, seed=run.experiment.split.seed,
    )  # fmt: skip
    ours = run.normaliser
    for k, marker in enumerate(markers):
        if not np.allclose([ours.low[k], ours.high[k]], [again.low[k], again.high[k]], rtol=1e-4, atol=1e-6):
            return [
                f"the model's normaliser is not what its training groups give ({marker}: {ours.low[k]:.4g} to "
                f"{ours.high[k]:.4g}, not {again.low[k]:.4g} to {again.high[k]:.4g}): it was fitted on other cells"
            ]
    return []


def _scaled(store: CellStore) -> list[str]:
    """Tell of images that `prepare` found to be scaled one by one."""
    markers = store.info.get("scaled_by_image", [])
    if not markers:
        return []
    return [
        f"the images of {', '.join(markers)} seem to be scaled one by one before they came here, each by its own "
        "extremes: brightness cannot be compared between images, and held-out images set their own scale"
    ]


def _some(names: NDArray[Any]) -> str:
    known = list(np.unique(names))
    return ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "")
