"""The study in words: the methods paragraph of a supplement, and the one-page model card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from imgshared.evaluation.imputability import LOW
from imgshared.evaluation.study import Study
from imgshared.evaluation.verdict import stamps
from imgshared.prediction import Run

NAMED = 24  # groups in a sentence; those of the run's split all stand under provenance


def methods(run: Run, study: Study) -> str:
    """Say exactly what was done, for a supplement."""
    store, config, experiment = study.store, study.config, run.experiment
    size = f" at {store.pixel_size_um:g} µm a pixel" if store.pixel_size_um else ""
    n = experiment.normalise
    scale = f"{n.transform} (cofactor {n.cofactor:g})" if n.transform == "arcsinh" else n.transform
    (train, _), (test, judged) = study.counts()["train"], study.counts()["test"]
    sampled = f", a random sample of the {judged:,} there are (seed {config.seed})" if test < judged else ""
    said = [
        f"Cells were cut to {store.crop_px} × {store.crop_px} pixels{size}, showing {', '.join(run.panel.markers)}. "
        f"Intensities were normalised by marker ({scale}, then the {n.low:g} to {n.high:g} percentile of the training "
        "groups to 0 to 1)."
    ]
    said.append(f"{run.title} (imgshared) predicts each protein from {', '.join(run.sources)}.")
    said += _split(study)
    groups = study.test.obs[config.group].nunique()
    said.append(f"{test:,} cells of {groups} values of {config.group} were judged{sampled}.")
    if config.labels:
        unit = config.fold or config.group
        where = "the training cells" if study.turns else f"{config.folds} folds of {unit}"
        others = "the judged cells" if study.leaks else f"other values of {unit}"
        kinds = {
            "features": "logistic regression (L2, C = 0.1, classes balanced) on 45 features of a stain",
            "cnn": f"a {config.cnn} with group normalisation, at most {config.cnn_steps} batches of 64 crops, stopped "
            "on inner groups",
        }
        said.append(
            f"Classifiers of {', '.join(config.labels)} ({' and '.join(kinds[c] for c in config.classifiers)}) learnt "
            f"from {where} and were tested on {others}, every input given by the same cells; a loss of AUROC up to "
            f"{config.margin:g} did not count."
        )
    said.append(
        f"Intervals are 95%, from the delete-one-{config.group} jackknife with Student's t. The floors are a marker's "
        f"mean training picture and ridge regression on blurs of {' and '.join(run.sources)} ({train:,} training "
        "cells)."
    )
    return " ".join(said)


def _split(study: Study) -> Iterator[str]:
    """Say who trained, who stopped the training, who was judged: names and numbers of cells."""
    by = study.run.split.by
    if study.nested:
        yield (
            f"In a nested study of {len(study.looks)} folds of {by}, normaliser, model and classifiers were fitted "
            f"without the fold that they were judged on, and inner groups {held_for(study.run)}."
        )
    for k, one in enumerate(study.looks, 1):
        split, obs = one.run.split, one.cohort.source.obs
        cells = pd.Series(split.assign(obs)).value_counts()
        parts = [
            f"{_named(names)} ({cells.get(part, 0):,} cells) {did}"
            for part, did in (("train", "trained"), ("val", held_for(study.run)))
            if (names := getattr(split, part))
        ]
        judged = sorted(set(study.store.obs[by].astype(str).iloc[one.cohort.judged]))
        parts.append(f"{_named(judged)} ({len(one.cohort.judged):,}) judged")
        yield (f"Fold {k}: of {by}, " if study.nested else f"Of {by}, ") + "; ".join(parts) + "."
    if study.leaks:
        yield f"This leaks: {'; '.join(study.leaks)}."


def held_for(run: Run) -> str:
    """Say what validation groups did: they always calibrate; a game of two players they cannot stop."""
    stopped = any(stage.monitored for stage in run.method.stages)
    return "stopped the training and calibrated the model" if stopped else "calibrated the model"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} values"


def model_card(run: Run, study: Study, tables: dict[str, pd.DataFrame], summary: list[str], notes: list[str]) -> str:
    """Write one page of Markdown: what the model is, what it may be used for, how far each stain can be trusted."""
    lines = [f"# Model card: {run.path.name}", ""]
    for word, reasons in stamps(study.leaks, tables["controls"], study.cautions):
        lines += [f"**{word}**: {reason}." for reason in reasons]
    split = "nested folds" if study.nested else f"{run.split.by} {', '.join(run.split.train)}"
    lines += [
        "## What it is", "",
        f"{run.title}, {sum(p.numel() for p in run.method.parameters()):,} parameters; predicts "
        f"{', '.join(run.panel.proteins)} of single cells from {run.panel.chromatin}, or what else its method takes.",
        f"Trained on {split} of `{Path(run.experiment.data).name}` (SHA-256 {run.contract.data_hash[:12]}…), crops of "
        f"{study.store.crop_px} px.", "",
        "## What it may be used for", "",
        "Predicting these stains in images of the same microscope, staining protocol, pixel size and kind of cell. Its "
        "contract refuses other pixel sizes, crops, dtypes and missing markers; it cannot refuse another protocol.", "",
        "## How far to trust each stain", "",
        "| stain | pictures recovered | brightness recovered | floors | labels |", "|---|---|---|---|---|",
        *_rows(tables), "",
        f"Shares of the variation between the judged cells, with 95% intervals; below {LOW:g}, do not use it for "
        "that.", "",
        "## What was found", "", *(f"- {s}" for s in summary), "",
        "## How it was judged", "", methods(run, study), "",
    ]  # fmt: skip
    lines += ["## Notes", "", *(f"- {note}." for note in notes), ""] if notes else []
    return "\n".join(lines)


def _rows(tables: dict[str, pd.DataFrame]) -> Iterator[str]:
    stains = {r["marker"]: r["verdict"] for r in tables["stains"].to_dict("records")}
    for r in tables["imputability"].to_dict("records"):
        marker = r["marker"]
        told = tables["labels"]
        mine = told[told["marker"] == marker].to_dict("records") if len(told) else []
        labels = "; ".join(f"{t['label']}: {t['verdict']}" for t in mine) or "–"
        shares = [
            _share(r.get(name, np.nan), r.get(f"{name}_low", np.nan), r.get(f"{name}_high", np.nan))
            for name in ("image", "intensity")
        ]
        yield f"| {marker} | {shares[0]} | {shares[1]} | {stains.get(marker, '–')} | {labels} |"


def _share(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:.2f}" + ("" if np.isnan(low) else f" ({low:.2f} to {high:.2f})")
