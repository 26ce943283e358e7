"""Do the verdicts agree with what the simulator knows? Shared, specific and mixed causes, over several seeds.

    python scripts/study_verdicts.py OUT [--seeds 1 2 3] [--cells 3600] [--donors 24] [--epochs 8]

Labels, each cut at its median over cells, and `treatment` (which acts through shared factors) and `drug` (through FOXO3
alone). What each stain's verdict must be:

shared     nuclear area, heterochromatin, treatment: never inferior or lost, wherever the real stain tells it
specific   a stain's own factor, independent of chromatin; `drug`: lost by the stain that shows it
mixed      a stain's own factor where it follows a shared one with r = 0.6: told, and worse than by the real stain
none       `drug` for the stains other than FOXO3, a stain's own independent factor for the others: not in the real one

The share of wrong verdicts is told twice: of the labels that the real stain tells by the verdict's own rule (what it
does not tell says nothing of a prediction), and of all pairs of label and stain whose truth is known. Beside it the
share of the label that the prediction recovers, by cause. translator by its mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import MEAN, ROOT, markdown, record
from rich.console import Console

import imgshared
from imgshared.config import Experiment, load
from imgshared.data.store import CellStore
from imgshared.evaluation.verdict import TOLD
from imgshared.prediction import Run

SHARED = ("nuclear_area", "heterochromatin")
OWN = {"lamin_level": "LaminB1", "foxo_switch": "FOXO3", "tubulin_level": "Tubulin", "cd45_level": "CD45"}
UNTOLD = ("not in the real stain", "in the prediction alone")
RIGHT = {
    "shared": ("not inferior",),
    "specific": ("lost",),
    "mixed": ("inferior", "not shown"),
    "none": ("not in the real stain",),
}


def main() -> None:
    """Run what is missing, then count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--cells", type=int, default=3600)
    parser.add_argument("--donors", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--record", type=Path, default=None, help="JSON to write (default: OUT/verdicts.json)")
    a = parser.parse_args()
    rows = []
    for seed in a.seeds:
        for scenario in ("independent", "entangled"):
            store = stored(a, seed, scenario)
            run = trained(a, store, seed, scenario)
            labels = ["treatment", "drug", *(f"{name}_high" for name in (*SHARED, *OWN))]
            found = imgshared.evaluate(run, store, console=Console(), labels=labels)
            rows += [
                {"seed": seed, "scenario": scenario, **row}
                for row in judged(found.labels, found.imputability, scenario)
            ]
    table = pd.DataFrame(rows)
    told = table[~table["verdict"].isin(UNTOLD) & (table["cause"] != "none")]
    wrong = {"of the labels that the real stain tells": told, "of all pairs": table}
    shares = {what: float(1 - some["right"].mean()) for what, some in wrong.items()}
    by_cause = table.groupby("cause", sort=False).agg(
        right=("right", "mean"), pairs=("right", "count"), share_least=("share", "min"),
        share_median=("share", "median"), share_greatest=("share", "max"),
    ).reset_index()  # fmt: skip
    record(a.record or a.out / "verdicts.json", {"rows": rows, "wrong": shares, "causes": by_cause.to_dict("records")})
    print(markdown(by_cause.to_dict("records")), "\n")
    print("\n".join(f"wrong: {shares[what]:.1%} of {len(some)} {what[3:]}" for what, some in wrong.items()), "\n")
    print(markdown(table[~table["right"]].drop(columns=["right"]).to_dict("records")))


def cause_of(label: str, marker: str, scenario: str) -> str | None:
    """Return what kind of cause a label is for a stain; None where it follows one in part, through a shared factor."""
    name = label.removesuffix("_high")
    if name in SHARED or name == "treatment":
        return "shared"
    if name == "drug":
        return "specific" if marker == "FOXO3" else "none"
    if OWN[name] != marker:
        return "none" if scenario == "independent" else None
    return "specific" if scenario == "independent" else "mixed"


def judged(labels: pd.DataFrame, imputability: pd.DataFrame, scenario: str) -> list[dict[str, Any]]:
    """Compare each verdict with its cause."""
    brightness = imputability.set_index("marker")["intensity"]
    rows = []
    for r in labels.to_dict("records"):
        cause = cause_of(r["label"], r["marker"], scenario)
        if cause is None:
            continue
        row = {"cause": cause, "label": r["label"], "marker": r["marker"], "verdict": r["verdict"]}
        row |= {"real": r["real"], "predicted": r["predicted"], "share": r["share"] if r["real"] > TOLD else None}
        row |= {"imputability": float(brightness[r["marker"]])}
        rows.append({**row, "right": r["verdict"] in RIGHT[cause]})
    return rows


def stored(a: argparse.Namespace, seed: int, scenario: str) -> Path:
    """Simulate and prepare, once a seed and scenario; factors become labels, cut at their medians."""
    folder = a.out / f"{scenario}_{seed}"
    images, store = folder / "images", Path(folder / "cells.zarr")
    if not store.exists():
        if not images.exists():
            imgshared.simulate(images, cells=a.cells, donors=a.donors, scenario=scenario, seed=seed, console=Console())
        cells = pd.read_csv(images / "cells.csv")
        for name in (*SHARED, *OWN):
            cells[f"{name}_high"] = np.where(cells[name] > cells[name].median(), "high", "low")
        cells.to_csv(folder / "labelled.csv", index=False)
        imgshared.prepare(images / "manifest.csv", store, cells=folder / "labelled.csv", qc=False, console=Console())
    return store


def trained(a: argparse.Namespace, store: Path, seed: int, scenario: str) -> Run:
    """Train on half of the donors, calibrate on a sixth, leave a third to be judged."""
    donors = sorted(CellStore(store).obs["group"].astype(str).unique())
    test, val = donors[-len(donors) // 3 :], donors[len(donors) // 2 : -len(donors) // 3]
    overrides = [f"data={store}", f"seed={seed}", f"split.test={test}", f"split.val={val}", f"method.epochs={a.epochs}"]
    overrides += MEAN
    experiment = load(Experiment, ROOT / "configs" / "translator.yaml", overrides)
    run = a.out / f"{scenario}_{seed}" / "run"
    return imgshared.train(experiment, out=run, resume=run.exists(), console=Console())


if __name__ == "__main__":
    main()
