"""Judge a trained run on its held-out cells: every table, and the report that shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from imgshared.config import EvaluateConfig
from imgshared.data.panel import Panel
from imgshared.data.place import partial_of, put_in_place
from imgshared.data.store import CellStore
from imgshared.evaluation import by_cell, checks, coverage, fidelity, figure_data, imputability, morphology, verdict
from imgshared.evaluation.classify import classify
from imgshared.evaluation.collect import Part, Predict, Progress
from imgshared.evaluation.given import Given
from imgshared.evaluation.judgeable import lacking
from imgshared.evaluation.kept import Keeper
from imgshared.evaluation.labels import read_label
from imgshared.evaluation.matrix import ARROW
from imgshared.evaluation.place import CELLS, refuse_place
from imgshared.evaluation.probes import probe
from imgshared.evaluation.realism import realism
from imgshared.evaluation.refit import nested
from imgshared.evaluation.report import Shown, write_report
from imgshared.evaluation.study import Study, study
from imgshared.evaluation.words import model_card
from imgshared.prediction import Run, predict_cells
from imgshared.training.log import read_metrics

# Tables too long for metrics.json
LONG = ("cells", "features", "effects", "pictures", "contradictions", "latent_maps", "training")


@dataclass(frozen=True)
class Evaluation:
    """What was found, as tidy tables.

    Parameters
    ----------
    fidelity
        See `fidelity.summarise` and `realism.realism`.
    groups
        See `fidelity.by_group` and `realism.realism`.
    stains
        Gain of each predicted stain over the floors, with a verdict.
    imputability
        See `imputability.imputability`.
    checks
        See `checks.summarise`: objects found and invented, whether the source matters.
    coverage, risk, reliability
        See `coverage`: do the intervals hold, does dropping unsure cells help, do intervals of other levels hold; empty
        where the run was not calibrated.
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
    pictures, contradictions, latent_maps
        What the report's pictures show: see `figure_data`.
    training
        The run's log, `metrics.jsonl`; empty for a nested study, whose folds have logs of their own.
    leaks, unsound, cautions
        What the result may not be believed for (`guard.cohort`), which controls failed (`verdict.unsound`), and what
        the images themselves bring along. Empty as they should be.
    notes
        What was left out and why, and what the reader must know, in words.
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
    imputability: pd.DataFrame
    checks: pd.DataFrame
    coverage: pd.DataFrame
    risk: pd.DataFrame
    reliability: pd.DataFrame
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
    pictures: pd.DataFrame
    contradictions: pd.DataFrame
    latent_maps: pd.DataFrame
    training: pd.DataFrame
    leaks: list[str]
    unsound: list[str]
    cautions: list[str]
    notes: list[str]
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
    """Judge a run on the held-out cells of a store, and write `report.html`, a model card, tables and `cells.zarr` (see
    `by_cell.write`) into `out`.

    Parameters
    ----------
    run
        From `imgshared.prediction.load_run`.
    store
        Cells with the columns that `config` names; the run's own split says which are held out. With `config.refit`
        the store that trained the run: its groups are judged by the imputers that `refit.fit_folds` left in `out`.
    progress
        Called with what is being done, how much of it is done, and of how much.
    predict
        Another source of predictions, called as `imgshared.prediction.predict_cells` is.

    Raises
    ------
    InputError
        For an unknown column or value, a label with one class, too few groups, groups on both sides, or a store without
        a group that the model has not seen.
    """
    say = progress or (lambda what, done, total: None)
    out = Path(out)
    refuse_place(out, run, store, config)
    own = predict is predict_cells and config.predictions is None  # of others it is not known what they depend on
    keeper = Keeper(out / "cache") if own else None
    if config.refit:
        looked = nested(run, store, out, config, say, keeper)
    else:
        looked = study(run, store, config, predict, say, keeper)
    if keeper:
        keeper.tidy()
    tables, probabilities, notes = _judge(looked, out / "cache", say)
    notes = [*_told_of(run, looked), *notes]
    summary = verdict.sentences(tables["stains"], tables["labels"], run.panel.chromatin, run.sources)
    summary += verdict.differences(tables["conditions"])

    (out / "cache").mkdir(parents=True, exist_ok=True)  # by which `refuse_place` knows the folder, whatever happens
    cells, partial_cells = by_cell.table(looked.test, looked.config), partial_of(out / CELLS)
    by_cell.write(looked.test, cells, run.panel, partial_cells)
    files = [f"tables/{name}.csv" for name in tables | {"cells": None}]
    for stale in ("metrics.json", "model_card.md", "report.html", "tables/probabilities.parquet", *files):
        (out / stale).unlink(missing_ok=True)  # of an earlier evaluation: results never mix
    put_in_place(partial_cells, out / CELLS)
    say("report", 0, 1)
    report = write_report(Shown(run, looked, tables, summary, notes), out / "report.html")
    tables["cells"] = cells
    unsound = verdict.unsound(tables["controls"])
    plain: dict[str, Any] = {"leaks": looked.leaks, "unsound": unsound, "cautions": looked.cautions}
    plain |= {"summary": summary, "notes": notes}
    plain["cells_used"] = {part: used for part, (used, _) in looked.counts().items()}
    plain["cells"] = {part: total for part, (_, total) in looked.counts().items()}
    plain["splits"] = [
        {"by": s.by, **{p: list(getattr(s, p)) for p in ("train", "val", "test")}} for s in looked.splits
    ]
    plain |= {name: _records(table) for name, table in tables.items() if name not in LONG}
    (out / "tables").mkdir(exist_ok=True)
    for name, table in tables.items():
        if len(table):
            _write(out / "tables" / f"{name}.csv", partial(table.to_csv, index=False, float_format="%.5g"))
    if len(probabilities):
        _write(out / "tables" / "probabilities.parquet", lambda path: probabilities.to_parquet(path, index=False))
    card = model_card(run, looked, tables, summary, notes)
    _write(out / "model_card.md", lambda path: path.write_text(card, encoding="utf-8"))
    # The last one: where it stands, the others do.
    _write(out / "metrics.json", lambda path: path.write_text(json.dumps(plain, indent=1) + "\n"))
    say("report", 1, 1)
    return Evaluation(
        **tables,
        probabilities=probabilities,
        leaks=looked.leaks,
        unsound=unsound,
        cautions=looked.cautions,
        notes=notes,
        summary=summary,
        report=report,
        metrics=plain,
    )


def _judge(looked: Study, cache: Path, say: Progress) -> tuple[dict[str, pd.DataFrame], pd.DataFrame, list[str]]:
    """Return the tables by name, the classifiers' probabilities, and notes."""
    panel, config, test = looked.run.panel, looked.config, looked.test
    say("intervals", 0, 1)
    units = test.obs[config.group].astype(str).to_numpy()
    distances, by_group = realism(test, [look.train for look in looked.looks], panel, units)
    groups = fidelity.by_group(test.fidelity)
    tables = {
        "fidelity": pd.concat([fidelity.summarise(test.fidelity), distances], ignore_index=True),
        "groups": groups.merge(by_group, on=["marker", "group", "prediction"], how="left"),
        "stains": verdict.judge_stains(fidelity.against_floors(test.fidelity)),
    }
    each = [imputability.shown(look.run, look.cohort.source) for look in looked.looks]
    least = {marker: min(shown[marker] for shown in each) for marker in panel.markers}  # over the imputers
    tables["imputability"] = imputability.imputability(test.fidelity, least)
    tables["checks"] = checks.summarise(test.checks)
    trust = test.trust
    tables |= {"coverage": coverage.summarise(trust), "risk": coverage.risk(trust)}
    tables["reliability"] = coverage.reliability(trust)
    say("cell features", 0, 1)
    tables |= dict(zip(("features", "effects", "conditions"), _measure(test, panel, config), strict=True))
    told = classify(test, looked.turns, panel, config, say, cache)
    tables |= {"classifiers": told.scores, "contrasts": told.contrasts, "agreement": told.agreement}
    tables |= {"controls": told.controls, "labels": verdict.judge_labels(told.scores, told.contrasts, config.margin)}
    tables["imputability"] = imputability.with_labels(tables["imputability"], tables["labels"])
    tables["probes"] = pd.DataFrame()
    if not looked.nested:
        targets = (len(config.labels) + len(config.factors)) * len(test.latents)
        tables["probes"] = probe(looked.looks[0].train, test, config, _counter(say, "latent probes", targets))
    tables["pictures"] = figure_data.pictures(test)
    tables["contradictions"] = figure_data.contradictions(test.maps)
    tables["latent_maps"] = figure_data.latent_points(test, panel.chromatin)
    tables["training"] = pd.DataFrame() if looked.nested else pd.DataFrame(read_metrics(looked.run.path))
    return tables, told.probabilities, told.notes


def _told_of(run: Run, looked: Study) -> Iterator[str]:
    """Say what a reader must know of the run and the store."""
    store, config = looked.store, looked.config
    yield from _told_of_cells(looked)
    if config.predictions is not None:
        yield f"The images judged were read from {config.predictions}; latents are those of {run.path}"
        made_of = Given.open(config.predictions, sharp=config.sharp).info.get("sources", run.sources)
        if set(made_of) != set(run.sources):
            yield (
                f"They were predicted from {', '.join(made_of)}; the linear floor knows {', '.join(run.sources)}, and "
                f"classifiers of chromatin {run.panel.chromatin} alone: what the others tell counts as the prediction's"
            )
    if config.sharp:
        yield "The sharp output is judged, not the mean: it shows likely texture, whose pixels are not to be measured"
    if looked.nested:
        yield "Each fold's model has latents of its own, which are not compared: latents are judged without --refit"
    if looked.turns and config.labels and not looked.leaks:
        yield (
            "Classifiers learnt from cells that had trained the model. Predictions of these are better than of unseen "
            "cells, so the scores of predicted stains are too low, if anything, and those of "
            f"predicted{ARROW}real too high"
        )
    if store.data_hash != run.contract.data_hash:
        yield f"{store.path} is not the store that trained the model; its groups are told apart by name alone"
    if run.experiment.unstained:
        hidden = ", ".join(run.experiment.unstained)
        yield f"The model learnt as if groups lacked {hidden}; the floors and classifiers did not"
    if run.sources != (run.panel.chromatin,):
        yield (
            f"Stains, and the linear floor, are predicted from {', '.join(run.sources)}, which are not judged. "
            f"Classifiers of chromatin know {run.panel.chromatin} alone: what the others tell counts as the "
            "prediction's"
        )
    if len(set(looked.test.fidelity["group"])) == 1:
        yield f"One value of {config.group!r} is held out: no interval can be given, verdicts rest on it alone"


def _told_of_cells(looked: Study) -> Iterator[str]:
    """Say which held-out cells are not judged, and which stains have no linear floor: cells may be unpaired."""
    why = ((looked.unpredicted, lacking(looked.run)), (looked.bare, "show no protein to judge"))
    left = [f"{count:,} {what}" for count, what in why if count]
    if left:
        total = looked.unpredicted + looked.bare + looked.counts()["test"][1]
        yield f"Not judged of {total:,} held-out cells: {', '.join(left)}"
    panel, judged = looked.run.panel, dict.fromkeys(looked.test.fidelity["marker"])
    alone = [m for m in judged if not all(look.train.measured[:, panel.index(m)].any() for look in looked.looks)]
    if alone:
        where, what = " in some folds" if len(looked.looks) > 1 else "", f"{', '.join(alone)} beside {panel.chromatin}"
        yield f"No training cell that was looked at shows {what}{where}: the linear floor is the mean picture there"


def _measure(test: Part, panel: Panel, config: EvaluateConfig) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Features real against predicted; differences between the classes of every label, and their summary."""
    _, groups = np.unique(test.obs[config.group].astype(str).to_numpy(), return_inverse=True)
    labels = [read_label(test.obs, name, config.label_values) for name in config.labels]
    differences = [morphology.differ(test, panel, label, groups) for label in labels]
    effects, conditions = ([tables[k] for tables in differences] for k in (0, 1))
    return morphology.correlate(test, panel, groups), _joined(effects), _joined(conditions)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


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
