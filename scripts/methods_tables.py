"""The tables and pictures of `benchmark_methods.py`, from its results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import ROOT, fold_off, markdown, record
from figures import draw_scale_bar, show
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

import imgshared
from imgshared.evaluation.figures import INK

# column: how a marker's row gives it, how it is written, what is best
SCORES: dict[str, tuple[str, str, Callable[..., float]]] = {
    "r": ("pearson", "{:.2f}", max),
    "gain over linear": ("gain", "{:+.2f}", max),
    "SSIM": ("ssim", "{:.2f}", max),
    "detail, fold off": ("detail_off", "{:.1f}", min),
    "intensity": ("intensity_spearman", "{:.2f}", max),
    "KID": ("kid", "{:.1f}", min),
    "agreement": ("kappa", "{:.2f}", max),
}
COSTS: dict[str, tuple[str, str, Callable[..., float] | None]] = {
    "train s": ("train_seconds", "{:.0f}", None),
    "train cells/s": ("train_cells_per_s", "{:,.0f}", max),
    "predict cells/s": ("predict_cells_per_s", "{:,.0f}", max),
    "memory MB": ("memory_mb", "{:,.0f}", min),
    "parameters": ("parameters", "{:,.0f}", None),
}
LEAST = {"agreement": 0.1}  # below that the best of a column is chance
BY_MARKER = {
    "r": "pearson",
    "gain over linear": "gain",
    "SSIM": "ssim",
    "detail: power of fine structures, predicted over real": "spectral_ratio",
    "intensity": "intensity_spearman",
    "KID": "kid",
}
ANSWERS = {
    "agreement (Cohen's kappa)": "kappa",
    "share of cells with the same answer": "agreement",
    "balanced accuracy on predicted stains": "accuracy_predicted",
}


def write(folder: Path, dataset: str, paths: Sequence[Path], settings: dict[str, Any]) -> None:
    """Gather the results of a dataset into one JSON, with the names of those that are missing."""
    rows = [json.loads(p.read_text()) for p in paths if p.exists()]
    missing = [p.parent.name for p in paths if not p.exists()]
    methods = list(dict.fromkeys(p.parent.name.partition("_")[0] for p in paths))
    whole = {"dataset": dataset, **settings, "methods": methods, "missing": missing, "rows": rows}
    edition = "" if settings["edition"] == "cpu" else f"_{settings['edition']}"
    record(folder / f"methods_{dataset}{edition}.json", whole)


def tell(
    folder: Path,
    methods: Sequence[str],
    *,
    readme: bool,
    pictures: Path | None = None,
    datasets: Sequence[str] | None = None,
) -> None:
    """Print every dataset's table and write it beside its JSON with the tables of markers.

    With `readme` those of the cpu edition go there, too, if they hold all `methods` and runs.
    """
    for path in sorted(folder.glob("methods_*.json")):
        result = both_outputs(json.loads(path.read_text()))
        name, cpu = result["dataset"], result["edition"] == "cpu"
        if datasets is not None and name not in datasets:
            continue
        table = f"{overview(result)}\n\n{made_by(result)}"
        print(f"\n{name}{'' if cpu else ', edition ' + result['edition']}\n\n{table}")
        parts = [f"# {path.stem.removeprefix('methods_')}\n", table, *details(result)]
        path.with_suffix(".md").write_text("\n".join(parts) + "\n")
        if readme and cpu:
            lacks = [*(m for m in methods if m not in result["methods"]), *result["missing"]]
            if lacks or result.get("repeats"):
                raise SystemExit(f"{path} lacks {', '.join(lacks) or 'repeats'}: README keeps the table that it has")
            into_readme(name, table)
            if pictures is not None and (pictures / f"methods_{name}.png").exists():
                target = ROOT / "docs" / f"methods_{name}.png"
                target.write_bytes((pictures / f"methods_{name}.png").read_bytes())


def both_outputs(result: dict[str, Any]) -> dict[str, Any]:
    """Give the sharp output of a method a row of its own, which costs nothing more."""
    sharp = [
        {**{k: row[k] for k in ("dataset", "turn")}, "method": f"{row['method']}, sharp", "markers": row["sharp"]}
        for row in result["rows"]
        if "sharp" in row
    ]
    twice = {row["method"].partition(",")[0] for row in sharp}
    methods = [m for name in result["methods"] for m in ([name, f"{name}, sharp"] if name in twice else [name])]
    return {**result, "methods": methods, "rows": [*result["rows"], *sharp]}


def overview(result: dict[str, Any]) -> str:
    """Return the table of a dataset: a row a method."""
    table = pd.DataFrame([_flat(row) for row in result["rows"]])
    cells = {name: _column(table, result, name, *how) for name, how in {**SCORES, **COSTS}.items()}
    expected = len(table["turn"].unique()) if len(table) else 0
    rows = []
    for method in result["methods"]:
        done = int((table["method"] == method).sum()) if len(table) else 0
        note = "" if done == expected and done else f" ({done} of {expected or '?'} runs)"
        rows.append({"method": method + note, **{name: column.get(method, "–") for name, column in cells.items()}})
    return markdown(rows)


def made_by(result: dict[str, Any]) -> str:
    """Return how the results of a dataset were made: a sentence below its table."""
    of = result["provenance"]
    commits = list(dict.fromkeys(f"{row.get('commit') or of['commit']}" for row in result["rows"]))
    changed = " with changes" if any(row.get("dirty", of.get("dirty")) for row in result["rows"]) else ""
    precisions = list(dict.fromkeys(row["precision"] for row in result["rows"] if "precision" in row))
    minutes = [f"{result['minutes']:.0f} minutes in all"] if result.get("minutes") else []
    parts = [
        f"{result['seconds']:g} s of training a run",
        f"{result['workers']} at a time on {of['gpu'] or of['processor']}",
        *([" and ".join(precisions)] if precisions else []),
        *minutes,
        f"commit {', '.join(commits)}{changed}",
    ]
    return f"({'; '.join(parts)}.)"


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a run's scores as means over its markers; agreement over what can be read from real stains."""
    means = {key: float(np.mean([m[key] for m in row["markers"]])) for key in BY_MARKER.values()}
    kappas = [x["kappa"] for m in row["markers"] for x in m["labels"] if x["readable"]]
    off = fold_off([m["spectral_ratio"] for m in row["markers"]])
    return {**row, **means, "detail_off": off, "kappa": float(np.mean(kappas)) if kappas else math.nan}


def _column(
    table: pd.DataFrame, result: dict[str, Any], name: str, key: str, form: str, best: Callable[..., float] | None
) -> dict[str, str]:
    """Return a column's text by method."""
    if not len(table) or table[key].isna().all():
        return {}
    values = table.pivot_table(key, "turn", "method")
    means = values.mean()
    good = set() if best is None or means.max() < LEAST.get(name, -math.inf) else ties(values, best)
    out = {}
    for method in [m for m in result["methods"] if m in means and not math.isnan(means[m])]:
        text = f"**{said(means[method], form)}**" if method in good else said(means[method], form)
        own = values[method].dropna()
        spread = f" ({said(own.min(), form)} to {said(own.max(), form)})" if name in SCORES and len(own) > 1 else ""
        out[method] = text + spread
    return out


def said(value: float, form: str) -> str:
    """Return a number as text, never a negative zero."""
    text = form.format(value)
    return text.replace("-", "+" if "+" in form else "") if float(text.replace(",", "")) == 0 else text


def ties(values: pd.DataFrame, best: Callable[..., float]) -> set[str]:
    """Return the method with the best mean, and those whose range over seeds or folds overlaps its range.

    `values` has a column a method; one that has not finished every run is not among them.
    """
    values = values.dropna(axis=1)
    if values.empty:
        return set()
    means, least, greatest = values.mean(), values.min(), values.max()
    first = means.index[list(means).index(best(list(means)))]
    overlap = (least <= greatest[first]) & (greatest >= least[first])
    return {str(m) for m in values.columns[overlap]}


def details(result: dict[str, Any]) -> list[str]:
    """Return the tables of markers: every score and what classifiers say, means over seeds or folds."""
    rows = [{**m, "method": r["method"]} for r in result["rows"] for m in r["markers"]]
    if not rows:
        return []
    table, out = pd.DataFrame(rows), []
    order = [m for m in result["methods"] if m in set(table["method"])]
    for name, key in BY_MARKER.items():
        form = next((form for own, form, _ in SCORES.values() if own == key), "{:.2f}")
        out += [f"\n## {name}\n", _by_marker(table, "marker", key, form, order)]
    answers = pd.DataFrame([{**x, "method": r["method"], "marker": f"{r['marker']}, {x['label']}"}
                            for r in rows for x in r["labels"]])  # fmt: skip
    for title, key in ANSWERS.items() if len(answers) else ():
        real = answers.assign(method="accuracy on real stains", **{key: answers["accuracy_real"]})
        both = pd.concat([real, answers])
        columns = ["accuracy on real stains", *order]
        out += [f"\n## {title}\n", _by_marker(both, "marker", key, "{:.2f}", columns)]
    return out


def _by_marker(table: pd.DataFrame, rows: str, key: str, form: str, methods: Sequence[str]) -> str:
    values = table.pivot_table(key, rows, "method", sort=False)
    return markdown({rows: name, **{m: said(row[m], form) for m in methods}} for name, row in values.iterrows())


def into_readme(dataset: str, table: str) -> None:
    """Write a table between its marks in README."""
    path = ROOT / "README.md"
    text = path.read_text()
    marks = (f"<!-- methods:{dataset} -->", f"<!-- /methods:{dataset} -->")
    if not all(mark in text for mark in marks):
        raise SystemExit(f"README.md has no place for {dataset}: write {marks[0]} and {marks[1]} on lines of their own")
    new = re.sub(
        f"{re.escape(marks[0])}.*?{re.escape(marks[1])}",
        lambda _: f"{marks[0]}\n{table}\n{marks[1]}",
        text,
        flags=re.DOTALL,
    )
    if new != text:
        path.write_text(new)


def picture(
    out: Path, dataset: str, paths: Sequence[Path], markers: Sequence[str], quantiles: Sequence[float]
) -> Figure | None:
    """Draw DNA | real | a column a method, of the first seed or fold; one contrast in a row."""
    first = [p.parent for p in paths]
    turn = first[0].name.partition("_")[2]
    found = {f.name.partition("_")[0]: np.load(f / "shown.npz") for f in first
             if f.name.partition("_")[2] == turn and (f / "shown.npz").exists()}  # fmt: skip
    if not found:
        return None
    some = next(iter(found.values()))
    columns = {name: (crops, "predicted") for name, crops in found.items()}
    columns |= {f"{name}, sharp": (c, "sharp") for name, c in found.items() if f"{markers[0]}/sharp" in c}
    rows = [(marker, k) for marker in markers for k in range(len(some[f"{marker}/real"]))]
    store = imgshared.open_store(out / "stores" / dataset / "cells.zarr")
    side = 1.05
    figure = Figure(((2 + len(columns)) * side + 0.3, len(rows) * side + 0.35), facecolor="white",
                    layout=ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02))  # fmt: skip
    axes = figure.subplots(len(rows), 2 + len(columns), squeeze=False)
    for number, (line, (marker, k)) in enumerate(zip(axes, rows, strict=True)):
        dna, real = some[f"{marker}/dna"][k], some[f"{marker}/real"][k]
        low, high = np.percentile(real, (0.5, 99.5))
        top = number == 0
        show(line[0], dna, store.panel.chromatin if top else "", *np.percentile(dna, (0.5, 99.5)))
        show(line[1], real, "real" if top else "", low, high)
        for ax, (method, (crops, output)) in zip(line[2:], columns.items(), strict=True):
            show(ax, crops[f"{marker}/{output}"][k], method if top else "", low, max(high, low + 1e-3))
        # two short lines: for a label longer than its row the layout leaves no room
        name = marker if len(quantiles) == 1 else f"{marker}\n{100 * quantiles[k]:.0f}%"
        line[0].text(-0.06, 0.5, name, rotation=90, ha="right", va="center", ma="center", fontsize=8.5, color=INK,
                     transform=line[0].transAxes)  # fmt: skip
    draw_scale_bar(axes[0][0], store.crop_px, store.pixel_size_um)
    path = out / f"methods_{dataset}.png"
    figure.savefig(path, dpi=110)
    print(path)
    return figure
