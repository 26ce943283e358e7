"""What the harness asks for: a classifier that learns from some cells and is tested on others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Cells = NDArray[np.intp]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """Cells as one input gives them, gathered when they are wanted: a study of a thousand networks shares its crops.

    Parameters
    ----------
    arrays
        (N, F) features or (N, Y, X) crops, one a part of the input.
    rows
        (n,) rows of each array, one a cell.
    """

    arrays: tuple[NDArray[Any], ...]
    rows: tuple[Cells, ...]

    def __len__(self) -> int:
        return len(self.rows[0])

    def take(self, at: Any = slice(None)) -> NDArray[Any]:
        """Return (n, F) features, or (n, K, Y, X) crops, of some of the cells, the parts side by side."""
        parts = [array[rows[at]] for array, rows in zip(self.arrays, self.rows, strict=True)]
        return np.concatenate([p[:, None] if p.ndim == 3 else p for p in parts], 1)


@dataclass(frozen=True)
class Job:
    """One classifier: what it learns from, what it is tested on.

    Parameters
    ----------
    backend
        ``features`` or ``cnn``.
    learn, truth, groups
        The cells learnt from, and the class and group of each.
    tests
        Inputs to give the probabilities of, one after another.
    classes
        How many there are.
    """

    backend: str
    learn: View
    truth: Cells
    groups: Cells
    tests: tuple[View, ...]
    classes: int


def keys(jobs: Sequence[Job], settings: Sequence[Any]) -> list[str]:
    """Name each job by all that its answer depends on: equal names, equal answers."""
    known: dict[int, bytes] = {}

    def content(array: NDArray[Any]) -> bytes:
        if id(array) not in known:
            whole = hashlib.blake2b(f"{array.shape}{array.dtype}".encode(), digest_size=16)
            for block in range(0, len(array), 4096):
                whole.update(np.ascontiguousarray(array[block : block + 4096]).data)
            known[id(array)] = whole.digest()
        return known[id(array)]

    def name(job: Job) -> str:
        said = hashlib.blake2b(repr((job.backend, job.classes, *settings)).encode(), digest_size=16)
        for view in (job.learn, *job.tests):
            for array, rows in zip(view.arrays, view.rows, strict=True):
                said.update(content(array) + content(rows))
            said.update(b"view")
        said.update(content(job.truth) + content(job.groups))
        return said.hexdigest()

    return [name(job) for job in jobs]
