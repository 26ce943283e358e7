"""translator on simulated cells: is the split clean, what does each term do, and does every further stain help?

    python scripts/study_translator_simulated.py OUT [--seeds 1 2 3] [--cells 2400] [--epochs 8] [--subset-epochs 20]

1. All terms on, every seed: shared factors from z_s of DNA, specific factors from it and from their own z_m (linear
   probes on three held-out donors), as `study_simulated.py` asks of apollo.
2. Each term off in turn, first seed: what it changes.
3. Any subset: configs/translator.yaml as it is, trained once; the error on a hidden stain from chromatin alone, from
   chromatin and one other stain, from all others.

Seed 0 is left out: the settings were chosen on its cells. A finished run is not computed again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import ROOT, markdown, metrics, record
from rich.console import Console
from study_simulated import SHARED, SPECIFIC, SPLIT

import imgshared
from imgshared import metrics as scores
from imgshared.config import Experiment, load
from imgshared.data.store import CellStore
from imgshared.prediction import Run, predict_cells

TERMS = {
    "shared": 0.03,
    "adversarial": 0.03,
    "patch_nce": 0.001,
    "cycle": 0.05,
    "identity": 0.05,
    "agreement": 0.001,
    "independence": 0.01,
    "norm": 1e-4,
}
HELD_OUT = ("D08", "D09", "D10")
SHOWN = pd.Series({"chromatin": 1e3, "and one": 1e3, "and all": 1e3, "all / chromatin": 1.0})


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--cells", type=int, default=2400)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--subset-epochs", type=int, default=20)
    parser.add_argument(
        "--record", type=Path, default=None, help="JSON to write (default: OUT/translator_simulated.json)"
    )
    a = parser.parse_args()
    split = [{"seed": s, **one(a, s, None)} for s in a.seeds]
    ablation = [{"without": "nothing", **_figures(split[0])}]
    ablation += [{"without": term, **one(a, a.seeds[0], term)} for term in TERMS]
    hidden = [{"seed": s, **row} for s in a.seeds for row in subsets(as_shipped(a, s), CellStore(stored(a, s)))]
    result = {"cells": a.cells, "epochs": a.epochs, "weights": TERMS, "split": split, "ablation": ablation}
    result |= {"subset_epochs": a.subset_epochs, "subsets": hidden}
    record(a.record or a.out / "translator_simulated.json", result)
    print("\nall terms on, a row a seed\n\n" + markdown(split))
    print("\neach term off in turn\n\n" + markdown(ablation))
    means = pd.DataFrame(hidden).groupby("hidden", sort=False).mean(numeric_only=True).drop(columns="seed") * SHOWN
    print("\nmean squared error on a hidden stain of held-out cells, by what is given, x 1000; mean over seeds\n")
    print(markdown({"hidden": name, **row} for name, row in means.iterrows()))


def stored(a: argparse.Namespace, seed: int) -> Path:
    """Simulate and prepare, once a seed."""
    images, store = a.out / f"data_{seed}" / "images", a.out / f"data_{seed}" / "cells.zarr"
    if not store.exists():
        if not images.exists():
            imgshared.simulate(images, cells=a.cells, donors=10, seed=seed, console=Console())
        imgshared.prepare(images / "manifest.csv", store, cells=images / "cells.csv", console=Console())
    return Path(store)


def folder(a: argparse.Namespace, seed: int, without: str | None) -> Path:
    """Where a run is."""
    return Path(a.out / (f"all_terms_{seed}" if without is None else f"without_{without}_{seed}"))


def as_shipped(a: argparse.Namespace, seed: int) -> Run:
    """Train the configuration that users start from."""
    run = Path(a.out / f"as_shipped_{seed}")
    overrides = [f"data={stored(a, seed)}", f"seed={seed}", f"method.epochs={a.subset_epochs}", *SPLIT]
    experiment = load(Experiment, ROOT / "configs" / "translator.yaml", overrides)
    return imgshared.train(experiment, out=run, resume=run.exists(), console=Console())


def one(a: argparse.Namespace, seed: int, without: str | None) -> dict[str, Any]:
    """Train and evaluate with all terms but one, and return its figures."""
    run, store = folder(a, seed, without), stored(a, seed)
    report = run / "evaluation" / "cells"
    if not (report / "metrics.json").exists():
        Console().rule(run.name)
        weights = [f"method.weights.{k}={0 if k == without else v}" for k, v in TERMS.items()]
        weights += ["method.weights.sharp=0"] if without == "adversarial" else []
        overrides = [f"data={store}", f"seed={seed}", f"method.epochs={a.epochs}", *SPLIT, *weights]
        experiment = load(Experiment, ROOT / "configs" / "translator.yaml", overrides)
        trained = imgshared.train(experiment, out=run, resume=run.exists(), console=Console())
        factors = [*SHARED, *SPECIFIC.values()]
        imgshared.evaluate(trained, store, console=Console(), factors=factors, seed=seed)
    return read(report) | detail(imgshared.load_run(run), CellStore(store))


def read(report: Path) -> dict[str, float]:
    """Return the probes' R2 and the fidelity of predicted stains, means over factors and markers."""
    tables = metrics(report)
    probes = tables["probes"][tables["probes"]["score"] == "r2"].set_index(["latent", "target"])["value"]
    of_dna, own = probes["z_s [DNA]"], [float(probes[f"z_m [{m}]", f]) for m, f in SPECIFIC.items()]
    fidelity = tables["fidelity"].query("prediction == 'predicted'").groupby("score")["value"].mean()
    return {
        "shared factors, z_s of DNA": float(of_dna[list(SHARED)].mean()),
        "specific factors, z_s of DNA": float(of_dna[list(SPECIFIC.values())].mean()),
        "greatest": float(of_dna[list(SPECIFIC.values())].max()),
        "specific factors, own z_m": float(np.mean(own)),
        "least": min(own),
        "r": float(fidelity["pearson"]),
        "intensity Spearman": float(fidelity["intensity_spearman"]),
    }


def detail(run: Run, store: CellStore, cells: int = 500) -> dict[str, float]:
    """Return the median spectral ratio of predicted (sharp) stains of some held-out cells, mean over markers."""
    held_out = np.flatnonzero(store.obs["group"].isin(HELD_OUT))
    some = held_out[:: max(1, len(held_out) // cells)]
    done = predict_cells(run, store, some, full=False, shared=False, latents=False, sharp=run.method.sharp)
    images = done.images["sharp" if run.method.sharp else "predicted"]
    ratios = []
    for marker in run.panel.proteins:
        c = run.panel.index(marker)
        rows = done.measured[:, c]
        ratios.append(np.nanmedian(scores.spectral_ratio(done.real[rows, c], images[rows, c])))
    return {"detail": float(np.mean(ratios))}


def subsets(run: Run, store: CellStore) -> list[dict[str, Any]]:
    """Return the error on each protein by the number of other stains that are given."""
    held_out = np.flatnonzero(store.obs["group"].isin(HELD_OUT))
    measured = store.measured[held_out]
    rows = []
    for marker in run.panel.proteins:
        hidden = store.panel.index(marker)
        # Cells of one staining batch hold the same proteins; take the first that holds this one.
        pattern = measured[measured[:, hidden]][0]
        cells = held_out[(measured == pattern).all(1)]
        others = [
            m for m in store.panel.markers if pattern[store.panel.index(m)] and m not in (marker, run.panel.chromatin)
        ]
        given = [[run.panel.chromatin], *([run.panel.chromatin, m] for m in others), [run.panel.chromatin, *others]]
        errors = [_error(run, store, cells, marker, sources) for sources in given]
        row = {"chromatin": errors[0], "and one": float(np.mean(errors[1:-1])), "and all": errors[-1]}
        rows.append({"hidden": marker, "others": ", ".join(others), **row, "all / chromatin": errors[-1] / errors[0]})
    mean = {str(k): v for k, v in pd.DataFrame(rows).mean(numeric_only=True).items()}
    return [*rows, {"hidden": "mean", "others": "", **mean}]


def _error(run: Run, store: CellStore, cells: Any, marker: str, sources: list[str]) -> float:
    done = predict_cells(run, store, cells, sources=sources, full=False, shared=False, latents=False)
    c = run.panel.index(marker)
    return float(np.mean((done.images["predicted"][:, c] - done.real[:, c]) ** 2))


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "seed"}


if __name__ == "__main__":
    main()
