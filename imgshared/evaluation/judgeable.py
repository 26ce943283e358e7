"""Which cells can be judged: those that show a protein beside all that it is predicted from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from imgshared.build import build_measured
from imgshared.data.feed import Feed
from imgshared.data.store import CellStore
from imgshared.prediction import Run
from imgshared.prediction.cells import lack_of
from imgshared.types import InputError

BLOCK = 256

Rows = NDArray[np.intp]
Shown = NDArray[np.bool_]  # (cells of a store, C in the order of the model's panel)
Crops = tuple[NDArray[np.float32], Shown]  # (n, C, Y, X), (n, C)


class Judgeable(NamedTuple):
    """Some cells, and how many were left out.

    Parameters
    ----------
    cells
        Rows of the store.
    unpredicted
        How many others lack chromatin or a source, so that nothing is predicted or judged in them.
    bare
        How many others have these and show no protein.
    """

    cells: Rows
    unpredicted: int
    bare: int


def judgeable(run: Run, store: CellStore, held: Rows) -> Judgeable:
    """Choose among held-out cells.

    Raises
    ------
    InputError
        Where none can be judged: says which proteins are measured, and what is missing beside them.
    """
    panel, needed, measured = run.panel, _needed(run), _measured(run, store, held)
    proteins = [c for c in range(len(panel)) if c not in needed]
    given, stained = measured[:, needed].all(1), measured[:, proteins]
    known = given & stained.any(1)
    if known.any():
        return Judgeable(held[known], int((~given).sum()), int((given & ~known).sum()))
    counts = [(panel.markers[c], n) for c, n in zip(proteins, stained.sum(0), strict=True) if n]
    told = "no protein of the model is measured in any held-out cell"
    if counts:
        each = [f"{marker} {'' if k else 'is measured '}in {n:,}" for k, (marker, n) in enumerate(counts)]
        told = f"{', '.join(each)} of {len(held):,} held-out cells, none of which shows {_beside(run)}"
    raise InputError(
        f"{store.path}: {told}: nothing to judge. Give a store with cells of unseen groups that show a protein and its "
        "source together"
    )


def lacking(run: Run) -> str:
    """Say what cells lack in which nothing can be predicted and judged, e.g. ``do not show DNA``."""
    return lack_of([run.panel.markers[c] for c in _needed(run)], every=True)


def _beside(run: Run) -> str:
    """Say what a protein must be measured beside, e.g. ``DNA, from which it is predicted``."""
    rest = "" if run.panel.chromatin in run.sources else f", and {run.panel.chromatin}"
    return f"{', '.join(run.sources)}, from which it is predicted{rest}"


def with_sources(run: Run, store: CellStore, cells: Rows) -> Rows:
    """Return those of some cells that show chromatin and what the method is bound to; there may be none."""
    return cells[_able(run, _measured(run, store, cells))]


def seen(run: Run, store: CellStore) -> Shown:
    """Return what the run could learn from in the store: less than is measured where `unstained` says so."""
    if store.data_hash == run.contract.data_hash:
        return build_measured(run.experiment, store, run.panel)
    return _all_measured(run, store)


def sampled(run: Run, store: CellStore, shown: Shown, limit: int) -> tuple[Rows, Rows]:
    """Draw at most so many training and validation cells that show the sources, each; there may be none."""
    parts, rng = run.split.assign(store.obs), np.random.default_rng(0)
    able = _able(run, shown)
    train, val = (np.sort(rng.permutation(np.flatnonzero((parts == part) & able))[:limit]) for part in ("train", "val"))
    return train, val


def draw(rows: Rows, limit: int, seed: int) -> Rows:
    """Draw at most so many of some cells, in order."""
    return rows if len(rows) <= limit else np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))


def unpaired(run: Run, store: CellStore, limit: int, seed: int = 0, shown: Shown | None = None) -> Iterator[Crops]:
    """Read at most so many training cells that lack a source: they, too, tell what a stain's mean picture is.

    Yields (n, C, Y, X) normalised crops and what is `shown` of them, (n, C); None: all that is measured.
    """
    shown = _all_measured(run, store) if shown is None else shown
    train = run.split.assign(store.obs) == "train"
    cells = draw(np.flatnonzero(train & ~_able(run, shown)), limit, seed)
    if len(cells):
        channels, cpu = run.contract.check(store, ()), torch.device("cpu")
        feed = Feed(store, cells, channels, run.normaliser, cpu, "stream", BLOCK, stained=shown[cells])
        for batch in feed.once(BLOCK):
            yield batch.images.numpy(), batch.measured.numpy()


def _needed(run: Run) -> list[int]:
    return list(dict.fromkeys([run.panel.chromatin_index, *(run.method.sources or ())]))


def _able(run: Run, shown: Shown) -> NDArray[np.bool_]:
    return np.asarray(shown[:, _needed(run)].all(1))


def _all_measured(run: Run, store: CellStore) -> Shown:
    return _measured(run, store, np.arange(len(store)))


def _measured(run: Run, store: CellStore, cells: Rows) -> Shown:
    """(n, C) in the order of the model's panel; False for a protein that the store does not hold."""
    channels = run.contract.check(store, [run.panel.markers[c] for c in _needed(run)])
    none = np.zeros(len(cells), bool)
    return np.column_stack([none if c is None else store.measured[cells, c] for c in channels])
