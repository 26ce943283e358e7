"""Where an evaluation may write: into an empty folder or over an earlier evaluation, never over what it reads."""

from __future__ import annotations

from pathlib import Path

from imgshared.config import EvaluateConfig
from imgshared.data.store import CellStore
from imgshared.prediction import Run
from imgshared.types import InputError

CELLS = "cells.zarr"
OURS = ("metrics.json", "report.html", "cache", "folds")  # one of them is there, however early a study was cut off


def refuse_place(out: Path, run: Run, store: CellStore, config: EvaluateConfig) -> None:
    """Refuse a folder, which need not exist, in which an evaluation would replace what is not its own.

    Raises
    ------
    InputError
        Names the folder: it is a file, it holds what is no evaluation, or the judged cells would be written over a
        store that is judged, was learnt from or holds the predictions.
    """
    ours = (out / CELLS).resolve()
    read = [store.path, Path(run.experiment.data)]
    if config.predictions is not None:
        read.append(Path(config.predictions))
    for path in read:
        theirs = path.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise InputError(
                f"{out / CELLS}, where the judged cells are written, is, holds or lies in {path}: choose another "
                "folder (--out)"
            )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another folder (--out)")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in OURS):
        raise InputError(f"{out} exists and holds no evaluation: choose another folder (--out)")
