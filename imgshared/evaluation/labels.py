"""Which cells carry which class, and which groups may be learnt from: the checks before any classifier is fitted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import mutual_info_score
from sklearn.model_selection import StratifiedGroupKFold

from imgshared.data.panel import nearest
from imgshared.data.split import column
from imgshared.types import InputError


@dataclass(frozen=True)
class Label:
    """One obs column as classes.

    Parameters
    ----------
    name
        The column.
    classes
        Its values, sorted, as text.
    codes
        (n,) position of each cell's value in `classes`; -1 where it is missing or not among the values asked for.
    missing, other
        How many cells have no value, or one that was not asked for.
    """

    name: str
    classes: tuple[str, ...]
    codes: NDArray[np.intp]
    missing: int
    other: int


def read_label(obs: pd.DataFrame, name: str, values: tuple[str, ...] | None = None) -> Label:
    """Read a label column; `values` restricts its classes where any of them occurs in the column.

    Raises
    ------
    InputError
        For an unknown column (with the nearest name), or one with fewer than two classes.
    """
    raw = column(obs, name)
    text = raw.astype(str).to_numpy()
    present = raw.notna().to_numpy() & ~np.isin(text, ("", "nan", "<NA>"))
    found = sorted(set(text[present]))
    classes = tuple(v for v in found if values is None or v in values) or tuple(found)
    if len(classes) < 2:
        raise InputError(
            f"label {name!r} has one class ({', '.join(classes) or 'no value at all'}) among the {len(obs)} cells: "
            "a classifier needs two. Choose another label, more cells, or other label_values"
        )
    position = {v: k for k, v in enumerate(classes)}
    codes = np.array([position.get(v, -1) if known else -1 for v, known in zip(text, present, strict=True)])
    return Label(name, classes, codes, int((~present).sum()), int((present & (codes < 0)).sum()))


def check_values(obs: pd.DataFrame, labels: tuple[str, ...], values: tuple[str, ...] | None) -> None:
    """Refuse a label value that no label column holds."""
    known = {v for name in labels for v in column(obs, name).astype(str)}
    for value in values or ():
        if value not in known:
            raise InputError(f"label_values: no label column holds {value!r}.{nearest(value, known)}")


def read_factor(obs: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """Read a numeric obs column, NaN where missing; refuse an unknown or non-numeric one."""
    raw = column(obs, name)
    numbers = pd.to_numeric(raw, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    if np.isnan(numbers).all():
        raise InputError(f"factor {name!r} holds no numbers: list it under labels, or leave it out")
    return numbers


def grouped_folds(
    label: Label, cells: NDArray[np.intp], folds_of: NDArray[Any], unit: str, folds: int, seed: int
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Split `cells` into (train, test) pairs; a fold unit is never on both sides, every training side has every class.

    Raises
    ------
    InputError
        Where there are fewer units than folds, one unit alone holds a class, or some training side would lack one.
    """
    units = np.unique(folds_of[cells])
    if len(units) < folds:
        raise InputError(
            f"label {label.name!r}: {folds} folds need {folds} values of {unit!r} among the held-out cells, there are "
            f"{len(units)} ({', '.join(map(str, units[:6]))}). Set folds={max(len(units), 2)} or another fold column"
        )
    for code, name in enumerate(label.classes):
        held_by = np.unique(folds_of[cells[label.codes[cells] == code]])
        if len(held_by) == 1:
            raise InputError(
                f"label {label.name!r}: every cell of class {name!r} is of {unit} {held_by[0]!r}, so that the class "
                "cannot be told from what else is special there: no honest split exists. Add groups with this "
                "class, or choose another label"
            )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    pairs = [(cells[train], cells[test]) for train, test in splitter.split(cells, label.codes[cells], folds_of[cells])]
    for train, _ in pairs:
        absent = set(range(len(label.classes))) - set(label.codes[train])
        if absent:
            raise InputError(
                f"label {label.name!r}: class {label.classes[min(absent)]!r} occurs in too few values of {unit!r} for "
                f"{folds} folds: leaving some out leaves none to learn from. Use fewer folds or another fold column"
            )
    return pairs


def refuse_untaught(label: Label, train: pd.DataFrame) -> None:
    """Refuse a label of which the training cells lack a class, as where it is a function of the group."""
    taught = set(column(train, label.name).astype(str))
    for name in label.classes:
        if name not in taught:
            raise InputError(
                f"label {label.name!r}: class {name!r} is in no training group of the run, so that no classifier could "
                "learn it there: with these groups no honest split exists. Hold out others, let classifiers learn "
                "among the held-out ones (train_on=test), or choose another label"
            )


def inner_groups(codes: NDArray[np.intp], groups: NDArray[Any], seed: int, parts: int = 5) -> NDArray[np.bool_] | None:
    """Choose whole groups, about one of `parts` of the cells, to stop a training; None where a class would be lost.

    Every class is both among the chosen cells and among the others.
    """
    parts = min(parts, len(np.unique(groups)))
    if parts < 2:
        return None
    classes = set(codes)
    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class of few cells: what is lost is looked at below
        for learn, kept in splitter.split(codes, codes, groups):
            if set(codes[learn]) == classes == set(codes[kept]):
                chosen = np.zeros(len(codes), bool)
                chosen[kept] = True
                return chosen
    return None


def permuted(
    codes: NDArray[np.intp],
    groups: NDArray[Any],
    count: int,
    seed: int,
    views: Sequence[NDArray[np.bool_]] = (),
) -> list[NDArray[np.intp]]:
    """Let groups trade labels: each cell takes the class of a random cell of the group that its own was paired with.

    So a class that whole groups share stays one, and groups keep what else makes them alike. With few groups a random
    trade often says the same as the truth, or its reverse: of 20 times as many, the `count` that tell least of it are
    returned (least mutual information, in the worst of `views`, parts of the cells; without, over all).
    """
    names, at = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(at == g) for g in range(len(names))]
    views = views or [np.ones(len(codes), bool)]
    drawn = []
    for _ in range(20 * count):
        new = np.empty_like(codes)
        for g, other in enumerate(rng.permutation(len(names))):
            new[rows[g]] = codes[rng.choice(rows[other], len(rows[g]))]
        if all(
            set(new[view]) == set(codes[view]) for view in views
        ):  # a view of one class would tell least, and nothing
            drawn.append(new)
    return sorted(drawn, key=lambda new: max(float(mutual_info_score(codes[v], new[v])) for v in views))[:count]


def refuse_shared_groups(obs_train: pd.DataFrame, obs_test: pd.DataFrame, unit: str) -> None:
    """Refuse a group with cells among those learnt from and those tested on."""
    both = sorted(set(column(obs_train, unit).astype(str)) & set(column(obs_test, unit).astype(str)))
    if both:
        raise InputError(
            f"{unit} {both[0]!r} has cells on both sides of the run's split ({len(both)} in all): a classifier would "
            "know the test cells' group. Choose another group column, or train with split.by set to it"
        )


def refuse_broken_folds(obs: pd.DataFrame, group: str, fold: str) -> None:
    """Refuse folds that would cut in two what is never split: a value of `group`, or a group of the store."""
    for unit in dict.fromkeys((group, *(["group"] if "group" in obs else []))):
        parts = column(obs, fold).astype(str).groupby(column(obs, unit).astype(str).to_numpy()).nunique()
        broken = sorted(parts.index[parts > 1])
        if broken:
            raise InputError(
                f"{unit} {broken[0]!r} has cells in several values of {fold!r}, so folds by {fold!r} would put it on "
                f"both sides ({len(broken)} in all). Set fold={unit}, or a column that holds whole groups"
            )
