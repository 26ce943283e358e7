"""Grouped splits: whole groups train, stop the training early, or are only reported on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared.data.panel import nearest
from imgshared.types import InputError


@dataclass(frozen=True)
class Split:
    """Values of the obs column `by` in each part."""

    by: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def assign(self, obs: pd.DataFrame) -> NDArray[np.str_]:
        """Return each cell's part: "train", "val", "test", or "none" for a value that the split does not know."""
        part = {v: name for name in ("train", "val", "test") for v in getattr(self, name)}
        return np.array([part.get(v, "none") for v in column(obs, self.by).astype(str)])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Split:
        """Read back what `to_dict` wrote."""
        return Split(data["by"], tuple(data["train"]), tuple(data["val"]), tuple(data["test"]))


def column(obs: pd.DataFrame, name: str) -> pd.Series[Any]:
    """Return an obs column, or raise `InputError` with the nearest name."""
    if name not in obs:
        raise InputError(
            f"no column {name!r} among {', '.join(map(str, obs.columns))}.{nearest(name, map(str, obs.columns))}"
        )
    return obs[name]


def make_split(
    obs: pd.DataFrame,
    *,
    by: str = "group",
    val: float | Sequence[str] = 0.15,
    test: float | Sequence[str] = 0.2,
    stratify: str | None = None,
    seed: int = 0,
) -> Split:
    """Split the values of the column `by`, by list or by fraction, at random with the seed.

    With `stratify`, the values of `by` are drawn within each stratum: the commonest value of that column among a
    value's cells.

    Raises
    ------
    InputError
        For an unknown column or value, a value in two parts, an empty training part, a part that stratification leaves
        empty, or cells of one `group` on both sides (where `by` is not "group").
    """
    values = column(obs, by).astype(str)
    known = sorted(values.unique())
    named = {"val": _named(val, known, by), "test": _named(test, known, by)}
    twice = set(named["val"]) & set(named["test"])
    if twice:
        raise InputError(f"split: {by} {', '.join(sorted(twice))} is in both val and test")
    free = [v for v in known if v not in named["val"] + named["test"]]
    strata = _strata(obs, values, stratify, free)
    rng = np.random.default_rng(seed)
    for part, wish in (("test", test), ("val", val)):
        if isinstance(wish, int | float) and wish > 0:
            named[part] = _draw(strata, wish * len(known), rng)
            if stratify and not named[part]:
                raise InputError(
                    f"split: no {by} can go to {part}, every {stratify} has only one left to train on: "
                    f"name the {part} values yourself, or leave out stratify"
                )
            strata = [[v for v in stratum if v not in named[part]] for stratum in strata]
    train = sorted(v for stratum in strata for v in stratum)
    if not train:
        raise InputError(f"split: no {by} is left to train on ({len(known)} in all)")
    split = Split(by, tuple(train), tuple(sorted(named["val"])), tuple(sorted(named["test"])))
    _refuse_broken_groups(obs, split)
    return split


def _named(wish: float | Sequence[str], known: list[str], by: str) -> list[str]:
    if isinstance(wish, int | float):
        return []
    for value in wish:
        if str(value) not in known:
            raise InputError(f"split: no {by} {str(value)!r} in the store.{nearest(str(value), known)}")
    return [str(v) for v in wish]


def _strata(obs: pd.DataFrame, values: pd.Series[Any], stratify: str | None, free: list[str]) -> list[list[str]]:
    if stratify is None:
        return [free]
    label = column(obs, stratify).astype(str).groupby(values.to_numpy()).agg(lambda s: s.mode().iloc[0])
    return [[v for v in free if label[v] == stratum] for stratum in sorted(set(label[free]))]


def _draw(strata: list[list[str]], count: float, rng: np.random.Generator) -> list[str]:
    """Draw about `count` values, in proportion from each stratum, at least one in all, never a whole stratum."""
    total = sum(map(len, strata))
    drawn: list[str] = []
    for stratum in strata:
        share = min(max(round(count * len(stratum) / max(total, 1)), 0), max(len(stratum) - 1, 0))
        drawn += list(rng.permutation(stratum)[:share])
    largest = max(strata, key=len, default=[])
    if not drawn and len(largest) > 1:
        drawn = [str(rng.choice(largest))]
    return [str(v) for v in drawn]


def _refuse_broken_groups(obs: pd.DataFrame, split: Split) -> None:
    if split.by == "group" or "group" not in obs:
        return
    parts = pd.Series(split.assign(obs)).groupby(obs["group"].astype(str).to_numpy()).nunique()
    broken = sorted(parts.index[parts > 1])
    if broken:
        raise InputError(
            f"split: group {broken[0]!r} has cells on both sides when splitting by {split.by!r} "
            f"({len(broken)} groups in all): split by 'group', or by a column that holds whole groups"
        )
