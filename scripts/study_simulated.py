"""Simulated cells with known causes: what z_s and z_m hold, and what predicted stains can tell.

    python scripts/study_simulated.py OUT [--seeds 0 1 2] [--cells 2400]

For each seed: the independent and the entangled scenario with apollo, and the independent one with the one-step
ablation. Ten donors, three of them held out, two to stop early. A finished evaluation is not computed again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from common import ROOT, markdown, metrics, record
from rich.console import Console

import imgshared
from imgshared.config import Experiment, load

SHARED = ("nuclear_area", "shape_x", "shape_y", "heterochromatin")
SPECIFIC = {
    "LaminB1": "lamin_level",
    "FOXO3": "foxo_switch",
    "gH2AX": "foci",
    "Tubulin": "tubulin_level",
    "CD45": "cd45_level",
}
SPLIT = ["split.test=[D08,D09,D10]", "split.val=[D06,D07]"]
RUNS = (("independent", "apollo"), ("entangled", "apollo"), ("independent", "apollo_one_step"))


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", type=int, default=2400)
    parser.add_argument("--record", type=Path, default=None, help="JSON to write (default: OUT/simulated.json)")
    a = parser.parse_args()
    rows = []
    for seed in a.seeds:
        for scenario, config in RUNS:
            report = one(a.out / f"{scenario}_{seed}", scenario, config, seed, a.cells)
            rows.append({"scenario": scenario, "method": config, "seed": seed, **read(report)})
    record(a.record or a.out / "simulated.json", {"cells": a.cells, "runs": rows})
    table = pd.DataFrame(rows)
    numbers = [c for c in table if c not in ("scenario", "method", "seed")]
    grouped = table.groupby(["method", "scenario"], sort=False)[numbers]
    mean, low, high = grouped.mean(), grouped.min(), grouped.max()
    shown = []
    for name in numbers:
        spread = {
            f"{m}, {s}": f"{mean.loc[m, s][name]:.2f} ({low.loc[m, s][name]:.2f} to {high.loc[m, s][name]:.2f})"
            for m, s in mean.index
        }
        shown.append({"": name, **spread})
    print(f"\nmean over seeds {a.seeds} (least to greatest)\n\n{markdown(shown)}")


def one(folder: Path, scenario: str, config: str, seed: int, cells: int) -> Path:
    """Simulate, prepare, train and evaluate, or return the report that is there."""
    console = Console()
    images, store, run = folder / "images", folder / "cells.zarr", folder / config
    report = run / "evaluation" / "cells"
    if (report / "metrics.json").exists():
        return report
    console.rule(f"{scenario}, {config}, seed {seed}")
    if not store.exists():
        if not images.exists():
            imgshared.simulate(images, cells=cells, donors=10, scenario=scenario, seed=seed, console=console)
        imgshared.prepare(images / "manifest.csv", store, cells=images / "cells.csv", console=console)
    experiment = load(Experiment, ROOT / "configs" / f"{config}.yaml", [f"data={store}", f"seed={seed}", *SPLIT])
    trained = imgshared.train(experiment, out=run, resume=run.exists(), console=console)
    imgshared.evaluate(
        trained,
        store,
        console=console,
        labels=["treatment", "drug"],
        factors=[*SHARED, *SPECIFIC.values()],
        train_on="train",
        seed=seed,
    )
    return report


def read(report: Path) -> dict[str, Any]:
    """Return the figures that the study is about."""
    tables = metrics(report)
    probes = tables["probes"][tables["probes"]["score"] == "r2"].set_index(["latent", "target"])["value"]
    scores = tables["classifiers"]
    accuracy = scores[scores["score"] == "balanced_accuracy"].set_index(["label", "marker", "input"])["value"]

    def mean(pairs: Any) -> float:
        return float(pd.Series([probes[pair] for pair in pairs]).mean())

    out = {
        "R2 shared factors, z_s of DNA": mean(("z_s [DNA]", f) for f in SHARED),
        "R2 specific factors, z_s of DNA": mean(("z_s [DNA]", f) for f in SPECIFIC.values()),
        "greatest of those": max(float(probes["z_s [DNA]", f]) for f in SPECIFIC.values()),
        "R2 specific factors, own z_m": mean((f"z_m [{m}]", f) for m, f in SPECIFIC.items()),
        "least of those": min(float(probes[f"z_m [{m}]", f]) for m, f in SPECIFIC.items()),
        "R2 specific factors, z_s of own protein": mean((f"z_s [{m}]", f) for m, f in SPECIFIC.items()),
    }
    for name in ("real", "full", "shared", "predicted"):
        per_marker = [float(accuracy["treatment", m, name]) for m in SPECIFIC]
        out[f"treatment, {name}"] = sum(per_marker) / len(per_marker)
    out["treatment, predicted / real"] = out["treatment, predicted"] / out["treatment, real"]
    out["treatment, DNA alone"] = float(accuracy["treatment", "LaminB1", "chromatin"])
    for name in ("real", "full", "shared", "predicted", "chromatin"):
        out[f"drug, FOXO3 {name}"] = float(accuracy["drug", "FOXO3", name])
    out["drug, greatest of any predicted stain"] = max(float(accuracy["drug", m, "predicted"]) for m in SPECIFIC)
    return out


if __name__ == "__main__":
    main()
