"""bbbc013 (FKHR-EGFP moves into the nucleus with the drug): rows A and E train, rows B and F are reported on.

    python scripts/study_bbbc013.py DATA OUT [--seeds 0]

DATA is the folder that holds bbbc013/. Low (dose_index 0-2) against high (7-10) dose, intervals over wells. What is
read from DNA, or predicted from it, must not exceed what a classifier reads from the DNA crops: more would be a leak.
And do 90% intervals, calibrated on four wells of the training rows, hold in the other rows?
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from common import ROOT, markdown, metrics, record
from rich.console import Console

import imgshared
from imgshared.config import Experiment, PrepareConfig, load

VAL = ("A03", "A09", "E03", "E09")  # wells of the training rows that stop the training


def main() -> None:
    """Prepare, train, evaluate, summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cnn", action="store_true", help="also the CNN classifier; slow on a CPU")
    parser.add_argument("--record", type=Path, default=None, help="JSON to write (default: OUT/bbbc013.json)")
    a = parser.parse_args()
    store = prepared(a.data.resolve() / "bbbc013", a.out)
    rows, coverage, stains = [], [], []
    for seed in a.seeds:
        report = one(store, a.out / f"seed_{seed}", seed, cnn=a.cnn)
        rows += [{"seed": seed, **row} for row in read(report)]
        coverage += [{"seed": seed, **row} for row in metrics(report)["coverage"].to_dict("records")]
        stains += [{"seed": seed, **row} for row in metrics(report)["stains"].to_dict("records")]
    record(a.record or a.out / "bbbc013.json", {"rows": rows, "coverage": coverage, "stains": stains})
    print("\nlow against high dose, rows B and F, AUROC\n\n" + markdown(rows))
    print("\nr a cell and gain over the floors, rows B and F\n\n" + markdown(stains))
    print("\nwithin 90% intervals, rows B and F\n\n" + markdown(coverage))


def prepared(data: Path, out: Path, *overrides: str) -> Path:
    """Write the manifest with the dose in words, and prepare the store once."""
    store, manifest = out / "cells.zarr", out / "manifest.csv"
    if not store.exists():
        wells = pd.read_csv(data / "wells.csv")
        wells["file"] = [str(data / f) for f in wells["file"]]
        dose = pd.cut(wells["dose_index"], [-1, 2, 6, 10], labels=["low", "middle", "high"])
        out.mkdir(parents=True, exist_ok=True)
        wells.assign(dose=dose).to_csv(manifest, index=False)
        config = load(PrepareConfig, ROOT / "configs" / "prepare_bbbc013.yaml", overrides)
        print(imgshared.prepare(manifest, store, console=Console(), config=config))
    return store


def one(store: Path, run: Path, seed: int, *, cnn: bool) -> Path:
    """Train and evaluate, or return the report that is there."""
    report = run / "evaluation" / "cells"
    if (report / "metrics.json").exists():
        return report
    wells = [f"{row}{column:02d}" for row in "BF" for column in range(1, 13)]
    overrides = [f"data={store}", f"seed={seed}", f"split.test={list(wells)}", f"split.val={list(VAL)}"]
    experiment = load(Experiment, ROOT / "configs" / "apollo.yaml", overrides)
    trained = imgshared.train(experiment, out=run, resume=run.exists(), console=Console())
    imgshared.evaluate(
        trained,
        store,
        console=Console(),
        labels=["dose"],
        label_values=["low", "high"],
        train_on="train",
        classifiers=["features", "cnn"] if cnn else ["features"],
        seed=seed,
    )
    return report


def read(report: Path) -> list[dict[str, object]]:
    """Return the AUROC of every input and latent, with its interval over wells."""
    tables = metrics(report)
    scores, probes = tables["classifiers"], tables["probes"]
    scores, probes = scores[scores["score"] == "auroc"], probes[probes["score"] == "auroc"]
    rows = []
    for r in scores.itertuples():
        what = "DNA crops" if r.input == "chromatin" else f"{r.marker}, {r.input}"
        rows.append({"read from": f"{what} ({r.backend})", **_value(r)})
    rows += [{"read from": r.latent, **_value(r)} for r in probes.itertuples()]
    return rows


def _value(row: object) -> dict[str, object]:
    return {
        name: round(float(getattr(row, key)), 3) for name, key in (("AUROC", "value"), ("low", "low"), ("high", "high"))
    }


if __name__ == "__main__":
    main()
