"""Judge a trained run on its held-out cells: every table, and the report that shows them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared.config import EvaluateConfig
from imgshared.data.panel import Panel
from imgshared.data.split import column
from imgshared.data.store import CellStore
from imgshared.evaluation import fidelity, morphology, verdict
from imgshared.evaluation.classify import classify
from imgshared.evaluation.collect import Part, Predict, Progress, collect
from imgshared.evaluation.features import typical_radius
from imgshared.evaluation.floors import Floors
from imgshared.evaluation.labels import (
    check_values,
    grouped_folds,
    read_factor,
    read_label,
    refuse_broken_folds,
    refuse_shared_groups,
)
from imgshared.evaluation.matrix import MATRIX
from imgshared.evaluation.probes import probe
from imgshared.evaluation.report import Shown, write_report
from imgshared.prediction import Run, predict_cells
from imgshared.prediction.types import PredictedCells
from imgshared.types import InputError

FLOOR_CELLS = 2000  # training cells for the floors where nothing else asks for more


@dataclass(frozen=True)
class Evaluation:
    """What was found, as tidy tables.

    Parameters
    ----------
    fidelity
        See `fidelity.summarise`.
    groups
        See `fidelity.by_group`.
    stains
        Gain of each predicted stain over the floors, with a verdict.
    cells
        One row a cell and measured protein: cell_id, image, group, labels, marker, l1, pearson, ssim, intensities.
    features, effects, conditions
        See `morphology.correlate` and `morphology.differ`: features of predicted against real stains, and the
        differences between the classes of each label in them.
    classifiers, contrasts, agreement, controls, probabilities
        See `classify.Classified`.
    labels
        Verdict on each label and protein: `verdict.judge_labels`.
    probes
        See `probes.probe`.
    summary
        The findings in sentences.
    report
        The written report.
    metrics
        All of the small tables as plain data, as in `metrics.json`.
    """

    fidelity: pd.DataFrame
    groups: pd.DataFrame
    stains: pd.DataFrame
    cells: pd.DataFrame
    features: pd.DataFrame
    effects: pd.DataFrame
    conditions: pd.DataFrame
    classifiers: pd.DataFrame
    contrasts: pd.DataFrame
    agreement: pd.DataFrame
    controls: pd.DataFrame
    probabilities: pd.DataFrame
    labels: pd.DataFrame
    probes: pd.DataFrame
    summary: list[str]
    report: Path
    metrics: dict[str, Any]


def evaluate(
    run: Run,
    store: CellStore,
    out: Path,
    config: EvaluateConfig,
    progress: Progress | None = None,
    *,
    predict: Predict = predict_cells,
) -> Evaluation:
    """Judge a run on the held-out cells of a store, and write `metrics.json`, tables and `report.html` into `out`.

    Parameters
    ----------
    run
        From `imgshared.prediction.load_run`.
    store
        Cells with the columns that `config` names; the run's own split says which are held out.
    progress
        Called with what is being done, how much of it is done, and of how much.
    predict
        Another source of predictions, called as `imgshared.prediction.predict_cells` is.

    Raises
    ------
    InputError
        For an unknown column or value, a label with one class, too few groups, groups on both sides, or a store without
        a held-out cell.
    """
    say = progress or (lambda what, done, total: None)
    panel = run.panel
    _check_columns(store.obs, config)
    parts = run.split.assign(store.obs)
    config = _resolve(config, store.obs[parts == "test"])
    bound = [c for c in run.method.sources or () if c != panel.chromatin_index]
    test_cells = _sample(parts, "test", config.max_cells, config.seed, run, store)
    wide = config.train_on == "train" or bool(config.labels or config.factors)
    limit = config.max_cells if wide else min(FLOOR_CELLS, config.max_cells)
    train_cells = _sample(parts, "train", limit, config.seed, run, store)
    _check_labels(store.obs.iloc[train_cells], store.obs.iloc[test_cells], config)
    cnn = bool(config.labels) and "cnn" in config.classifiers
    by_features = bool(config.labels) and "features" in config.classifiers
    on_train = config.train_on == "train"

    make = partial(_predict, partial(predict, run, store), bound)
    floors = Floors(len(panel), panel.chromatin_index, seed=config.seed)
    gather = partial(collect, make, store, panel)
    radius = typical_radius(store.masks(train_cells)) if by_features else None
    train = gather(
        train_cells,
        fit=floors,
        features=radius if on_train else None,
        crops=cnn and on_train,
        progress=partial(say, "training cells"),
    )
    test = gather(test_cells, against=floors, features=radius, crops=cnn, progress=partial(say, "held-out cells"))
    if test.fidelity.empty:
        raise InputError(f"{store.path}: no protein of the model is measured in any held-out cell: nothing to judge")
    test.fidelity["group"] = test.obs[config.group].astype(str).to_numpy()[test.fidelity["position"].to_numpy(int)]

    boot = {"n": config.bootstrap, "seed": config.seed}
    say("intervals", 0, 1)
    stains = verdict.judge_stains(fidelity.against_floors(test.fidelity, **boot))
    say("cell features", 0, 1)
    features, effects, conditions = _measure(test, panel, config)
    fits = len(config.labels) * len(panel.proteins) * len(config.classifiers) * len(MATRIX)
    told = classify(test, train if on_train else None, panel, config, _counter(say, "classifiers", fits))
    notes = verdict.unsound(told.controls) + told.notes
    targets = (len(config.labels) + len(config.factors)) * len(test.latents)
    probes = probe(train, test, config, _counter(say, "latent probes", targets))
    labels = verdict.judge_labels(told.scores, told.contrasts, config.margin)
    tables = {
        "fidelity": fidelity.summarise(test.fidelity, **boot),
        "groups": fidelity.by_group(test.fidelity),
        "stains": stains,
        "conditions": conditions,
        "classifiers": told.scores,
        "contrasts": told.contrasts,
        "agreement": told.agreement,
        "controls": told.controls,
        "labels": labels,
        "probes": probes,
    }
    if len(set(test.fidelity["group"])) == 1:
        notes.insert(
            0, f"One value of {config.group!r} is held out: no interval can be given, verdicts rest on it alone"
        )
    if bound:
        names = ", ".join(panel.markers[c] for c in run.method.sources or ())
        notes.insert(
            0, f"Predicted from {names}, which are not judged; read {names} for {panel.chromatin} as the source"
        )
    if run.experiment.unstained:
        hidden = ", ".join(run.experiment.unstained)
        notes.insert(0, f"The model learnt as if groups lacked {hidden}; the floors and classifiers did not")
    if store.data_hash != run.contract.data_hash:
        notes.insert(
            0, f"{store.path} is not the store that trained the model; its groups are told apart by name alone"
        )
    summary = verdict.sentences(stains, labels, panel.chromatin) + verdict.differences(conditions)
    counts = {part: int((parts == part).sum()) for part in ("train", "val", "test", "none")}
    used = {"train": len(train_cells), "test": len(test_cells)}

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("metrics.json", "cells.csv", "features.csv", "effects.csv", "probabilities.parquet", "report.html"):
        (out / stale).unlink(missing_ok=True)  # of an earlier evaluation: results never mix
    say("report", 0, 1)
    measured = {"features": features, "effects": effects}
    shown = Shown(run, store, config, panel, test, tables | measured, summary, notes, counts, used)
    report = write_report(shown, make, out / "report.html")
    cells = _cell_table(test, config)
    plain: dict[str, Any] = {"summary": summary, "notes": notes, "cells": counts, "cells_used": used}
    plain |= {name: _records(table) for name, table in tables.items()}
    for name, table in {"cells": cells, **measured}.items():
        if len(table):
            _write(out / f"{name}.csv", partial(table.to_csv, index=False, float_format="%.5g"))
    if len(told.probabilities):
        _write(out / "probabilities.parquet", lambda path: told.probabilities.to_parquet(path, index=False))
    # The last one: where it stands, the others do.
    _write(out / "metrics.json", lambda path: path.write_text(json.dumps(plain, indent=1) + "\n"))
    say("report", 1, 1)
    return Evaluation(
        **tables,
        **measured,
        cells=cells,
        probabilities=told.probabilities,
        summary=summary,
        report=report,
        metrics=plain,
    )


def _predict(predict: Predict, bound: list[int], cells: NDArray[np.intp], **wishes: bool) -> PredictedCells:
    """Predict; a stain that the method is given, and so knows, is none to judge."""
    done = predict(cells, **wishes)
    measured = done.measured.copy()
    measured[:, bound] = False
    return dataclasses.replace(done, measured=measured)


def _measure(test: Part, panel: Panel, config: EvaluateConfig) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Features real against predicted; differences between the classes of every label, and their summary."""
    _, groups = np.unique(test.obs[config.group].astype(str).to_numpy(), return_inverse=True)
    boot = {"n": config.bootstrap, "seed": config.seed}
    labels = [read_label(test.obs, name, config.label_values) for name in config.labels]
    differences = [morphology.differ(test, panel, label, groups, **boot) for label in labels]
    effects, conditions = ([tables[k] for tables in differences] for k in (0, 1))
    return morphology.correlate(test, panel, groups, **boot), _joined(effects), _joined(conditions)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _resolve(config: EvaluateConfig, held_out: pd.DataFrame) -> EvaluateConfig:
    """Decide where classifiers learn: too few held-out groups cannot be folded."""
    if config.train_on != "auto":
        return config
    units = held_out[config.fold or config.group].nunique()
    return dataclasses.replace(config, train_on="test" if units >= config.folds else "train")


def _check_columns(obs: pd.DataFrame, config: EvaluateConfig) -> None:
    for name in (*config.labels, config.group, *([config.fold] if config.fold else [])):
        column(obs, name)
    for name in config.factors:
        read_factor(obs, name)
    check_values(obs, config.labels, config.label_values)


def _check_labels(train: pd.DataFrame, test: pd.DataFrame, config: EvaluateConfig) -> None:
    """Refuse hopeless labels before hours of prediction."""
    fold = config.fold or config.group
    if config.labels:
        refuse_broken_folds(test, config.group, fold)
    if config.labels or config.factors:
        refuse_shared_groups(train, test, config.group)
    for name in config.labels:
        label = read_label(test, name, config.label_values)
        if config.train_on == "test":
            cells = np.flatnonzero(label.codes >= 0)
            grouped_folds(label, cells, test[fold].astype(str).to_numpy(), fold, config.folds, config.seed)


def _sample(parts: NDArray[np.str_], part: str, limit: int, seed: int, run: Run, store: CellStore) -> NDArray[np.intp]:
    """Draw at most `limit` cells of a part, all of them with chromatin and the sources that the method is bound to."""
    needed = list(dict.fromkeys([run.panel.chromatin, *(run.panel.markers[c] for c in run.method.sources or ())]))
    stained = store.measured[:, store.panel.indices(needed)].all(1)
    cells = np.flatnonzero((parts == part) & stained)
    if not len(cells):
        values = ", ".join(getattr(run.split, part)) or "nothing"
        raise InputError(
            f"the store has no {part} cell of this run with {', '.join(needed)}; the run's split by {run.split.by!r} "
            f"holds {values} for it. Give the store that the run was trained on, or train with split.{part} set"
        )
    if len(cells) <= limit:
        return cells
    return np.sort(np.random.default_rng(seed).choice(cells, limit, replace=False))


def _cell_table(test: Part, config: EvaluateConfig) -> pd.DataFrame:
    table = test.fidelity[test.fidelity["prediction"] == "predicted"]
    wanted = dict.fromkeys(("image", config.group, "group", *config.labels, *config.factors))
    about = test.obs[[c for c in wanted if c in test.obs]].iloc[table["position"].to_numpy(int)]
    scores = table[["marker", "l1", "pearson", "ssim", "intensity_real", "intensity_predicted"]]
    about = about.rename_axis("cell_id").reset_index()
    return pd.concat([about, scores.reset_index(drop=True)], axis=1)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain data; JSON knows no NaN."""
    rows = table.to_dict("records")
    return [{str(k): None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows]


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside, then rename: what carries the name is whole."""
    partial_path = path.with_name(path.name + ".partial")
    write(partial_path)
    partial_path.replace(path)


def _counter(say: Progress, what: str, total: int) -> Callable[[str], None]:
    done = 0

    def count(text: str) -> None:
        nonlocal done
        say(f"{what}: {text}", done, total)
        done += 1

    return count
