"""Several runs as one: an ensemble in a run folder of its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from imgshared.methods.ensemble import Ensemble
from imgshared.prediction.run import Run
from imgshared.training.checkpoint import save
from imgshared.training.folder import begin_run, best_path, changes
from imgshared.types import InputError


def make_ensemble(runs: Sequence[Run], out: Path, finish: Callable[[Path], object] = lambda folder: None) -> Path:
    """Write a run folder whose model is the ensemble of runs that differ in their seeds alone; beside, then renamed.

    The weights are copied: the members may be removed afterwards. `finish` is called with the folder before it gets its
    name, to calibrate what is in it.

    Raises
    ------
    InputError
        Where `out` exists, fewer than two runs are named, one is named twice or is no trained run, or their settings,
        data, groups or normalisers differ.
    """
    if len(runs) < 2:
        raise InputError("an ensemble needs two runs at least, trained with seed=0, seed=1, ...")
    first = runs[0]
    for run in runs:
        if run.path.is_file() or run.experiment.ensemble:
            raise InputError(f"{run.path} is no trained run: an ensemble is made of folders that `train` wrote")
    seeds = [run.experiment.seed for run in runs]
    for k, run in enumerate(runs[1:], 1):
        _refuse_other(first, run)
        if seeds[k] in seeds[:k]:
            raise InputError(
                f"{run.path} was trained with seed {seeds[k]}, as {runs[seeds.index(seeds[k])].path} was: two equal "
                "members tell nothing; train with seed=..."
            )
    experiment = dataclasses.replace(first.experiment, ensemble=tuple(seeds))
    if out.exists():
        raise InputError(f"{out} exists already: choose another folder, or remove it")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    begin_run(experiment, partial, False, first.fabric)
    (partial / "contract.json").write_text(json.dumps(first.contract.to_dict(), indent=2) + "\n")
    weights = Ensemble([run.method for run in runs]).state_dict()
    save(best_path(partial), {"model": weights}, first.contract)
    finish(partial)
    partial.rename(out)
    return out


def _refuse_other(first: Run, run: Run) -> None:
    """Refuse a member that differs from the first one in more than its seed."""
    ours, theirs = (dataclasses.asdict(r.experiment) | {"seed": 0, "data": "", "train": {}} for r in (first, run))
    differ = changes(ours, theirs)
    contracts = [r.contract.to_dict() for r in (first, run)]
    terms = [name for name, value in contracts[0].items() if contracts[1][name] != value]
    if differ or terms:
        named = "; ".join(differ) if differ else f"its {', '.join(terms)} (contract.json) differ"
        raise InputError(
            f"{run.path} cannot join {first.path} in an ensemble: {named}. Members are trained by one configuration on "
            "one store, with the same groups (split.val, split.test, split.seed), and differ in their seed"
        )
