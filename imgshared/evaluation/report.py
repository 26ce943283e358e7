"""The report: one HTML file without any link outwards, figures inside, tables that sort."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from imgshared.config import EvaluateConfig, dump
from imgshared.data.panel import Panel
from imgshared.evaluation import figures, tables, verdict, words
from imgshared.evaluation.collect import Part
from imgshared.evaluation.figures import Example
from imgshared.evaluation.matrix import BOTH
from imgshared.evaluation.study import Study
from imgshared.evaluation.verdict import CLEARS, NOT_INFERIOR, TOLD_BY_REAL
from imgshared.prediction import Run
from imgshared.prediction.trust import ODD

MAPS = 4  # columns of the latent maps


@dataclass(frozen=True)
class Shown:
    """Everything that the report shows."""

    run: Run
    study: Study
    tables: dict[str, pd.DataFrame]
    summary: list[str]
    notes: list[str]

    @property
    def config(self) -> EvaluateConfig:
        """The settings."""
        return self.study.config

    @property
    def panel(self) -> Panel:
        """The model's markers."""
        return self.run.panel

    @property
    def test(self) -> Part:
        """The judged cells."""
        return self.study.test


def write_report(shown: Shown, path: Path) -> Path:
    """Render the report; written beside, then renamed."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    found = shown.tables
    html = environment.get_template("report.html.j2").render(
        title=shown.run.path.name,
        chromatin=shown.panel.chromatin,
        sources=" and ".join(shown.run.sources),
        stamps=verdict.stamps(shown.study.leaks, found["controls"], shown.study.cautions),
        summary=shown.summary,
        notes=shown.notes,
        cards=_cards(shown),
        stains=tables.stain_table(found["stains"]),
        imputability=tables.imputability_table(found["imputability"]),
        labels=tables.label_table(found["labels"]),
        verdicts=list(found["labels"]["words"]) if len(found["labels"]) else [],
        stain_forest=_stain_forest(shown),
        galleries=_galleries(shown),
        intensities=_intensities(shown),
        fidelity=tables.fidelity_table(found["fidelity"]),
        checks=tables.check_table(found["checks"]),
        coverage=tables.coverage_table(found["coverage"]),
        odd=f"{100 * ODD:g}",
        risk=figures.risk(found["risk"]) if len(found["risk"]) else None,
        reliability=figures.reliability(found["reliability"]) if len(found["reliability"]) else None,
        contradictions=figures.contradictions(shown.test.maps) if shown.test.maps else None,
        groups=tables.group_table(found["groups"], shown.config.group),
        features=tables.feature_table(found["features"]),
        conditions=tables.condition_table(found["conditions"]),
        effects=_effects(found["effects"]),
        label_forests=_label_forests(shown),
        classifiers=tables.classifier_table(found["classifiers"]),
        agreement=tables.agreement_table(found["agreement"]),
        controls=tables.control_table(found["controls"]),
        margin=shown.config.margin,
        train_on=shown.config.train_on,
        folds=shown.config.folds,
        fold=shown.config.fold or shown.config.group,
        group=shown.config.group,
        probes=tables.probe_table(found["probes"]),
        maps=_maps(shown),
        curves=figures.training_curves(found["training"]),
        validation=words.held_for(shown.run),
        nested=shown.study.nested,
        methods=words.methods(shown.run, shown.study),
        provenance=_provenance(shown),
        config=dump(shown.config),
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path


# --- figures --------------------------------------------------------------------------------------------------------


def _points(part: pd.DataFrame, key: str, order: list[str]) -> list[tuple[str, float, float, float]]:
    found = {r[key]: (r["value"], r["low"], r["high"]) for r in part.to_dict("records")}
    return [(n, *found[n]) for n in order if n in found and np.isfinite(found[n][0])]


def _stain_forest(shown: Shown) -> str:
    table = shown.tables["fidelity"]
    table = table[table["score"] == "pearson"]
    order = ["full", "shared", "predicted", "linear", "marker_mean"]
    rows = [(str(m), _points(part, "prediction", order)) for m, part in table.groupby("marker", sort=False)]
    return figures.forest(rows, "Pearson r per cell, mean over judged cells, 95% interval")


def _label_forests(shown: Shown) -> list[tuple[str, str]]:
    table = shown.tables["classifiers"]
    if table.empty:
        return []
    table = table[table["score"] == "auroc"]
    order = ["real", "full", "shared", "predicted", "chromatin", BOTH]
    drawn = []
    for (label, backend), part in table.groupby(["label", "backend"], sort=False):
        rows = [(str(m), _points(one, "input", order)) for m, one in part.groupby("marker", sort=False)]
        drawn.append(
            (f"{label}, {backend}", figures.forest(rows, "AUROC, 95% interval (dashed: chance)", 0.5, width=5.2))
        )
    return drawn


def _galleries(shown: Shown) -> list[tuple[str, str]]:
    """Draw the cells of `figure_data.pictures`."""
    table = shown.tables["pictures"]
    positions = sorted(set(table["position"])) if len(table) else []
    if not positions:
        return []
    done, size = shown.study.pictures(positions), shown.study.store.pixel_size_um
    drawn = []
    for marker, part in table.groupby("marker", sort=False):
        channel = shown.panel.index(str(marker))
        examples = [
            Example(
                done.real[i, shown.panel.chromatin_index],
                done.real[i, channel],
                done.predicted[i, channel],
                done.uncertainty[i, channel],
                f"{rule}\nr {r:.2f}",
            )
            for i, rule, r in zip(map(positions.index, part["position"]), part["rule"], part["pearson"], strict=True)
        ]
        drawn.append((str(marker), figures.gallery(str(marker), shown.panel.chromatin, examples, size)))
    return drawn


def _intensities(shown: Shown) -> str | None:
    table = shown.test.fidelity
    table = table[table["prediction"] == "predicted"]
    scores = shown.tables["fidelity"]
    scores = scores[(scores["prediction"] == "predicted") & (scores["score"] == "intensity_pearson")]
    r = dict(zip(scores["marker"], scores["value"], strict=True))
    pairs = {
        str(m): (p["intensity_real"].to_numpy(), p["intensity_predicted"].to_numpy(), f"r {r[m]:.2f}")
        for m, p in table.groupby("marker", sort=False)
    }
    return figures.scatter(pairs) if pairs else None


def _effects(table: pd.DataFrame) -> list[tuple[str, str]]:
    drawn = []
    for (label, contrast), part in table.groupby(["label", "contrast"], sort=False) if len(table) else ():
        panels = {
            str(marker): (one["real"].to_numpy(float), one["predicted"].to_numpy(float), list(one["family"]))
            for marker, one in part.groupby("marker", sort=False)
        }
        drawn.append((f"{label}, {contrast}", figures.effects(panels)))
    return drawn


def _maps(shown: Shown) -> str | None:
    table, obs = shown.tables["latent_maps"], shown.test.obs
    if table.empty:
        return None
    colours: dict[str, Any] = {n: obs[n].astype(str).to_numpy() for n in shown.config.labels}
    colours |= {n: pd.to_numeric(obs[n], errors="coerce").to_numpy(float) for n in shown.config.factors}
    group = shown.config.group
    colours = dict(list((colours or {group: obs[group].astype(str).to_numpy()}).items())[:MAPS])
    points = {
        str(name): (part["position"].to_numpy(), part[["pc1", "pc2"]].to_numpy())
        for name, part in table.groupby("latent", sort=False)
    }
    return figures.latent_maps(points, colours)


# --- words ----------------------------------------------------------------------------------------------------------


def _cards(shown: Shown) -> list[tuple[str, str]]:
    stains = shown.tables["stains"]
    clears = int((stains["verdict"] == CLEARS).sum()) if len(stains) else 0
    groups = shown.test.obs[shown.config.group].nunique()
    cards = [(f"{clears} of {len(stains)}", "predicted stains clear both floors")]
    labels = shown.tables["labels"]
    if len(labels):
        told = labels[labels["verdict"].isin(TOLD_BY_REAL)]
        kept = int((told["verdict"] == NOT_INFERIOR).sum())
        cards.append((f"{kept} of {len(told)}", "pairs of label and stain are told not inferior to the real stain"))
    cards.append((f"{len(shown.test.cells):,}", f"cells judged, of {groups} {'group' if groups == 1 else 'groups'}"))
    return cards


def _provenance(shown: Shown) -> list[tuple[str, str]]:
    run, study = shown.run, shown.study
    store = study.store
    sampled = [
        f"{part}: {used:,} of {total:,} cells"
        + (f" (a random sample, seed {shown.config.seed})" if used < total else "")
        for part, (used, total) in study.counts().items()
    ]
    splits = [
        (f"fold {k}, {part}" if study.nested else f"split, {part}", ", ".join(getattr(split, part)) or "none")
        for k, split in enumerate(study.splits, 1)
        for part in ("train", "val", "test")
    ]
    size = store.pixel_size_um
    packages = ("imgshared", "torch", "numpy", "scikit-learn", "scikit-image", "timm")
    return [
        ("run", str(run.path.resolve())),
        ("method", run.title),
        ("store", str(store.path.resolve())),
        ("data hash (SHA-256)", store.data_hash),
        (
            "crops",
            f"{store.crop_px} × {store.crop_px} px" + (f", {size:g} µm a pixel" if size else ", pixel size unknown"),
        ),
        ("split by", run.split.by),
        *splits,
        ("cells", "; ".join(sampled)),
        ("versions", ", ".join(f"{p} {version(p)}" for p in packages)),
        ("written", datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
    ]
