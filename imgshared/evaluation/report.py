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
from imgshared.data.store import CellStore
from imgshared.evaluation import figures
from imgshared.evaluation.collect import Part, Predict
from imgshared.evaluation.figures import SAID, Example
from imgshared.prediction import Run
from imgshared.training.log import read_metrics

PERCENTILES = ((10, "poor"), (50, "median"), (90, "good"))  # of the per-cell Pearson: which cells are shown
MAPS = 4  # columns of the latent maps
SPECIFIC_MAPS = 4  # specific latents shown beside the shared one
MAP_CELLS = 3000  # dots a map
SCORES = {  # column: heading
    "pearson": "Pearson r, per cell",
    "pearson_pooled": "Pearson r, all pixels",
    "ssim": "SSIM",
    "l1": "L1",
    "intensity_pearson": "intensity, Pearson",
    "intensity_spearman": "intensity, Spearman",
}


@dataclass(frozen=True)
class Shown:
    """Everything that the report shows."""

    run: Run
    store: CellStore
    config: EvaluateConfig
    panel: Panel
    test: Part
    tables: dict[str, pd.DataFrame]
    summary: list[str]
    notes: list[str]
    counts: dict[str, int]
    used: dict[str, int]


@dataclass(frozen=True)
class Cell:
    """A table cell: text, a finer text below it, the value to sort by, and a heat between 0 and 1."""

    text: str
    below: str = ""
    sort: str | float = ""
    heat: float | None = None
    chip: str = ""


def write_report(shown: Shown, predict: Predict, path: Path) -> Path:
    """Render the report; written beside, then renamed."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.j2").render(
        title=shown.run.path.name,
        chromatin=shown.panel.chromatin,
        summary=shown.summary,
        notes=shown.notes,
        cards=_cards(shown),
        stains=_stain_table(shown),
        labels=_label_table(shown),
        stain_forest=_stain_forest(shown),
        galleries=_galleries(shown, predict),
        intensities=_intensities(shown),
        fidelity=_fidelity_table(shown),
        groups=_group_table(shown),
        label_forests=_label_forests(shown),
        classifiers=_classifier_table(shown),
        train_on=shown.config.train_on,
        folds=shown.config.folds,
        fold=shown.config.fold or shown.config.group,
        group=shown.config.group,
        probes=_probe_table(shown),
        maps=_maps(shown),
        curves=figures.training_curves(read_metrics(shown.run.path)),
        provenance=_provenance(shown),
        config=dump(shown.config),
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path


# --- tables: (headings, rows of cells) ------------------------------------------------------------------------------

Table = tuple[list[str], list[list[Cell]]]


def _value(row: Any, *, heat: tuple[float, float] | None = None) -> Cell:
    value, low, high = float(row["value"]), float(row["low"]), float(row["high"])
    if np.isnan(value):
        return Cell("–", sort=-9e9)
    warmth = None if heat is None else float(np.clip((value - heat[0]) / (heat[1] - heat[0]), 0, 1))
    return Cell(_fixed(value), "" if np.isnan(low) else f"{_fixed(low)} to {_fixed(high)}", value, warmth)


def _fixed(value: float) -> str:
    """Two decimals, a true minus sign, and no minus before zero."""
    return f"{value:z.2f}".replace("-", "−")


def _number(value: float) -> Cell:
    return Cell("–", sort=-9e9) if np.isnan(value) else Cell(_fixed(value), sort=float(value))


def _text(text: Any, chip: str = "") -> Cell:
    return Cell(str(text), sort=str(text).lower(), chip=chip)


def _count(value: int) -> Cell:
    return Cell(f"{value:,}", sort=value)


def _stain_table(shown: Shown) -> Table:
    head = ["stain", "verdict", "predicted", "linear", "mean picture", "gain over linear", "gain over mean picture"]
    chips = {"clears both floors": "good", "not clearly": "plain", "below a floor": "bad"}
    rows = []
    for row in shown.tables["stains"].to_dict("records"):
        cells = [_text(row["marker"]), _text(row["verdict"], chips[row["verdict"]]), _number(row["predicted"])]
        cells += [_number(row.get(floor, np.nan)) for floor in ("linear", "marker_mean")]
        for floor in ("linear", "marker_mean"):
            names = ("value", f"gain_{floor}"), ("low", f"gain_{floor}_low"), ("high", f"gain_{floor}_high")
            cells.append(_value({k: row.get(name, np.nan) for k, name in names}))
        rows.append(cells)
    return head, rows


def _label_table(shown: Shown) -> Table | None:
    table = shown.tables["labels"]
    if table.empty:
        return None
    chips = {"kept": "good", "partly kept": "plain", "lost": "bad", "not in the real stain": "faint"}
    inputs = [i for i in ("real", "full", "shared", "predicted", "chromatin") if i in table]
    head = ["label", "stain", "classifier", "in the prediction", *(SAID[i] for i in inputs)]
    rows = [
        [
            *(_text(r[c]) for c in ("label", "marker", "backend")),
            Cell(
                r["verdict"],
                "more than chromatin" if r["beyond_chromatin"] else "",
                r["verdict"],
                None,
                chips[r["verdict"]],
            ),
            *(_number(r[i]) for i in inputs),
        ]
        for r in table.to_dict("records")
    ]
    return head, rows


def _fidelity_table(shown: Shown) -> Table:
    rows = []
    for (marker, prediction), part in shown.tables["fidelity"].groupby(["marker", "prediction"], sort=False):
        scores = part.set_index("score")
        first = part.iloc[0]
        rows.append(
            [_text(marker), _text(SAID.get(str(prediction), prediction)), *(_value(scores.loc[s]) for s in SCORES)]
        )
        rows[-1] += [_count(int(first["cells"])), _count(int(first["groups"]))]
    return ["stain", "prediction", *SCORES.values(), "cells", "groups"], rows


def _group_table(shown: Shown) -> Table:
    table = shown.tables["groups"]
    rows = [
        [
            _text(r["marker"]),
            _text(r["group"]),
            _text(SAID.get(r["prediction"], r["prediction"])),
            *(_number(r[s]) for s in SCORES),
            _count(int(r["cells"])),
        ]
        for r in table.to_dict("records")
    ]
    return ["stain", shown.config.group, "prediction", *SCORES.values(), "cells"], rows


def _classifier_table(shown: Shown) -> Table | None:
    table = shown.tables["classifiers"]
    if table.empty:
        return None
    rows = []
    for keys, part in table.groupby(["label", "marker", "backend", "input"], sort=False):
        scores, first = part.set_index("score"), part.iloc[0]
        rows.append([*(_text(SAID.get(str(k), str(k))) for k in keys), _value(scores.loc["auroc"])])
        rows[-1] += [_value(scores.loc["balanced_accuracy"]), _number(1 / int(first["classes"]))]
        rows[-1] += [_count(int(first["cells"])), _count(int(first["groups"]))]
    head = [
        "label",
        "stain",
        "classifier",
        "input",
        "AUROC",
        "balanced accuracy",
        "its chance level",
        "cells",
        "groups",
    ]
    return head, rows


def _probe_table(shown: Shown) -> Table | None:
    """Latents as rows, targets as columns, shaded from chance (0) to perfect (1)."""
    table = shown.tables["probes"]
    if table.empty:
        return None
    table = table[table["score"].isin(["auroc", "r2"])]
    targets = list(dict.fromkeys(zip(table["target"], table["score"], strict=True)))
    at = {(r["latent"], r["target"], r["score"]): r for r in table.to_dict("records")}
    span = {"auroc": (0.5, 1.0), "r2": (0.0, 1.0)}
    rows = []
    for latent in dict.fromkeys(table["latent"]):
        cells = [at.get((latent, *target)) for target in targets]
        values = [_value(c, heat=span[t[1]]) if c else Cell("–") for c, t in zip(cells, targets, strict=True)]
        rows.append([_text(latent), *values])
    said = {"auroc": "AUROC", "r2": "R²"}
    return ["latent", *(f"{t}, {said[s]}" for t, s in targets)], rows


# --- figures --------------------------------------------------------------------------------------------------------


def _points(part: pd.DataFrame, key: str, order: list[str]) -> list[tuple[str, float, float, float]]:
    found = {r[key]: (r["value"], r["low"], r["high"]) for r in part.to_dict("records")}
    return [(n, *found[n]) for n in order if n in found and np.isfinite(found[n][0])]


def _stain_forest(shown: Shown) -> str:
    table = shown.tables["fidelity"]
    table = table[table["score"] == "pearson"]
    order = ["full", "shared", "predicted", "linear", "marker_mean"]
    rows = [(str(m), _points(part, "prediction", order)) for m, part in table.groupby("marker", sort=False)]
    return figures.forest(rows, "Pearson r per cell, mean over held-out cells, 95% interval")


def _label_forests(shown: Shown) -> list[tuple[str, str]]:
    table = shown.tables["classifiers"]
    if table.empty:
        return []
    table = table[table["score"] == "auroc"]
    order = ["real", "full", "shared", "predicted", "chromatin"]
    drawn = []
    for (label, backend), part in table.groupby(["label", "backend"], sort=False):
        rows = [(str(m), _points(one, "input", order)) for m, one in part.groupby("marker", sort=False)]
        drawn.append(
            (f"{label}, {backend}", figures.forest(rows, "AUROC, 95% interval (dashed: chance)", 0.5, width=5.2))
        )
    return drawn


def _galleries(shown: Shown, predict: Predict) -> list[tuple[str, str]]:
    """Cells at stated percentiles of the per-cell Pearson, so that nobody chose them by eye."""
    table = shown.test.fidelity
    table = table[table["prediction"] == "predicted"]
    chosen: list[tuple[str, list[tuple[int, str]]]] = []
    for marker, part in table.groupby("marker", sort=False):
        ranked = part.assign(pearson=part["pearson"].fillna(0)).sort_values("pearson", kind="stable")
        picks = [ranked.iloc[round(q / 100 * (len(ranked) - 1))] for q, _ in PERCENTILES]
        captions = [
            f"{word}\n({q}th pct)\nr {p['pearson']:.2f}" for (q, word), p in zip(PERCENTILES, picks, strict=True)
        ]
        chosen.append((str(marker), [(int(p["position"]), c) for p, c in zip(picks, captions, strict=True)]))
    positions = sorted({p for _, cells in chosen for p, _ in cells})
    if not positions:
        return []
    done = predict(shown.test.cells[positions], full=False, shared=False)
    source = done.real[:, shown.panel.chromatin_index]
    drawn = []
    for marker, cells in chosen:
        channel = shown.panel.index(marker)
        at = [(positions.index(p), caption) for p, caption in cells]
        examples = [Example(source[i], done.real[i, channel], done.images["predicted"][i, channel], c) for i, c in at]
        drawn.append((marker, figures.gallery(marker, shown.panel.chromatin, examples, shown.store.pixel_size_um)))
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


def _maps(shown: Shown) -> str | None:
    obs, latents = shown.test.obs, shown.test.latents
    shared = f"z_s [{shown.panel.chromatin}]"
    names = [shared] * (shared in latents) + [n for n in latents if n.startswith("z_m")][:SPECIFIC_MAPS]
    colours: dict[str, Any] = {n: obs[n].astype(str).to_numpy() for n in shown.config.labels}
    colours |= {n: pd.to_numeric(obs[n], errors="coerce").to_numpy(float) for n in shown.config.factors}
    colours = dict(
        list((colours or {shown.config.group: obs[shown.config.group].astype(str).to_numpy()}).items())[:MAPS]
    )
    if not names:
        return None
    some = np.sort(np.random.default_rng(0).permutation(len(obs))[:MAP_CELLS])
    found = {n: latents[n][some] for n in names if np.isfinite(latents[n][some]).all(1).sum() > 2}
    return figures.latent_maps(found, {n: c[some] for n, c in colours.items()}) if found else None


# --- words ----------------------------------------------------------------------------------------------------------


def _cards(shown: Shown) -> list[tuple[str, str]]:
    stains = shown.tables["stains"]
    clears = int((stains["verdict"] == "clears both floors").sum()) if len(stains) else 0
    groups = shown.test.obs[shown.config.group].nunique()
    cards = [(f"{clears} of {len(stains)}", "predicted stains clear both floors")]
    labels = shown.tables["labels"]
    if len(labels):
        told = labels[labels["verdict"] != "not in the real stain"]
        kept = int((told["verdict"] == "kept").sum())
        cards.append(
            (f"{kept} of {len(told)}", "label-and-stain pairs that real stains tell are kept by predicted ones")
        )
    cards.append((f"{shown.used['test']:,}", f"held-out cells of {groups} {'group' if groups == 1 else 'groups'}"))
    return cards


def _provenance(shown: Shown) -> list[tuple[str, str]]:
    run, store, split = shown.run, shown.store, shown.run.split
    sampled = [
        f"{part}: {shown.used[part]:,} of {shown.counts[part]:,} cells"
        + (f" (a random sample, seed {shown.config.seed})" if shown.used[part] < shown.counts[part] else "")
        for part in ("train", "test")
    ]
    size = store.pixel_size_um
    packages = ("imgshared", "torch", "numpy", "scikit-learn", "scikit-image", "timm")
    return [
        ("run", str(run.path.resolve())),
        ("method", run.experiment.method.name),
        ("store", str(store.path.resolve())),
        ("data hash (SHA-256)", store.data_hash),
        (
            "crops",
            f"{store.crop_px} × {store.crop_px} px" + (f", {size:g} µm a pixel" if size else ", pixel size unknown"),
        ),
        ("split by", split.by),
        *((f"split, {part}", ", ".join(getattr(split, part)) or "none") for part in ("train", "val", "test")),
        ("cells", "; ".join(sampled)),
        ("versions", ", ".join(f"{p} {version(p)}" for p in packages)),
        ("written", datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
    ]
