"""translator on simulated cells: is the split clean, what does each term do, and does every further stain help?

    python scripts/study_translator_simulated.py OUT [--parts split mean ablation subsets] [--seeds 1 2 3]
        [--ablation-seeds 1] [--chromatin-only 0.7 0.2] [--cells 2400] [--epochs 8] [--subset-epochs 20] [--record DIR]

split      All terms on, every seed: shared factors from z_s of DNA, specific factors from it, from their own z_m and
           from z_s of their own protein (linear probes on three held-out donors), as `study_simulated.py` asks of
           apollo. The adversarial, PatchNCE and cycle terms judge the sharp output here: no gradient of it goes
           further back than its texture, so that adversarial does not reach the latents, and the other two reach them
           only by how that output is encoded again.
mean       The same without a sharp output, so that all terms judge the mean and reach the latents; adversarial,
           PatchNCE and cycle with their weights in configs/translator_unpaired.yaml.
ablation   The terms of `split`, each off in turn, every seed of --ablation-seeds.
subsets    configs/translator.yaml but for its epochs and its sharp output, which is not looked at, trained once a seed
           and share of the cells that show chromatin alone: the error on a hidden stain from chromatin alone, from
           chromatin and one other stain, from all others; and from all others without the weights that were fitted on
           the validation groups.

Each part's result is translator_simulated_<part>.json. Seed 0 is left out: the settings were chosen on its cells. A
finished run is not computed again, and one of other settings is refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import MEAN, ROOT, experiment_settings, finished, fold_off, markdown, metrics, record, train_seconds
from rich.console import Console
from study_simulated import SHARED, SPECIFIC, SPLIT

import imgshared
from imgshared import losses
from imgshared import metrics as scores
from imgshared.config import Experiment, load
from imgshared.data.store import CellStore
from imgshared.methods.maps import MapMethod
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
ON_THE_MEAN = {**TERMS, "sharp": 0, "adversarial": 0.1, "patch_nce": 0.1, "cycle": 1.0}
Rows = list[dict[str, Any]]
HELD_OUT = ("D08", "D09", "D10")
SHOWN = pd.Series({"chromatin": 1e3, "and one": 1e3, "and all": 1e3, "all, unweighted": 1e3, "all / chromatin": 1.0})


def main() -> None:
    """Run what is missing of the chosen parts, then summarise."""
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "split": lambda a: {"weights": TERMS, "rows": [one(a, s, "all_terms", TERMS) for s in a.seeds]},
        "mean": lambda a: {"weights": ON_THE_MEAN, "rows": [one(a, s, "on_the_mean", ON_THE_MEAN) for s in a.seeds]},
        "ablation": lambda a: {"weights": TERMS, "rows": ablation(a)},
        "subsets": lambda a: {
            "rows": [row for share in a.chromatin_only for s in a.seeds for row in subsets(a, share, s)]
        },
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ablation-seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--chromatin-only", type=float, nargs="+", default=[0.7, 0.2], help="shares, of subsets")
    parser.add_argument("--cells", type=int, default=2400)
    parser.add_argument("--epochs", type=int, default=8, help="of all parts but subsets")
    parser.add_argument("--subset-epochs", type=int, default=20)
    parser.add_argument("--record", type=Path, default=None, help="folder for the JSON (default: OUT)")
    a = parser.parse_args()
    a.out = a.out.resolve()
    for part in a.parts:
        epochs = a.subset_epochs if part == "subsets" else a.epochs
        result = {"cells": a.cells, "epochs": epochs, "split": SPLIT, **parts[part](a)}
        record((a.record or a.out) / f"translator_simulated_{part}.json", result)
        print(f"\n{TITLES[part]}; mean over seeds (least to greatest)\n\n{over_seeds(result['rows'])}")


TITLES = {
    "split": "all terms on",
    "mean": "all terms on, no sharp output",
    "ablation": "each term off in turn",
    "subsets": "mean squared error on a hidden stain of held-out cells, by what is given, x 1000",
}


def over_seeds(rows: Rows) -> str:
    """Return a table of means over seeds with their spread, a row for each of what else tells rows apart."""
    table = pd.DataFrame(rows).drop(columns=["seed", "others"], errors="ignore")
    words = [c for c in ("without", "chromatin_only", "hidden") if c in table]
    numbers = table.drop(columns=words) * SHOWN.reindex(table.columns.drop(words), fill_value=1.0)
    shown: Rows = []
    for names, part in table.groupby(words, sort=False) if words else [((), table)]:
        row: dict[str, Any] = dict(zip(words, names, strict=True))
        for c, v in numbers.loc[part.index].items():
            row[str(c)] = f"{v.mean():.2f} ({v.min():.2f} to {v.max():.2f})"
        shown.append(row)
    return markdown(shown)


def stored(a: argparse.Namespace, seed: int) -> Path:
    """Simulate and prepare, once a seed."""
    folder, settings = a.out / f"data_{seed}", {"cells": a.cells, "donors": 10, "seed": seed}
    images, store, begun = folder / "images", folder / "cells.zarr", folder / "settings.json"
    if not finished(folder, begun, settings):
        folder.mkdir(parents=True, exist_ok=True)
        begun.write_text(json.dumps(settings) + "\n")
    if not store.exists():
        if not images.exists():
            imgshared.simulate(images, **settings, console=Console())
        imgshared.prepare(images / "manifest.csv", store, cells=images / "cells.csv", console=Console())
    return Path(store)


def trained(a: argparse.Namespace, run: Path, seed: int, *settings: str) -> Run:
    """Train configs/translator.yaml with other settings, or open the finished run."""
    overrides = [f"data={stored(a, seed)}", f"seed={seed}", *SPLIT, *settings]
    said, done = experiment_settings("translator", overrides), run / "done"
    if not finished(done, done, said):
        Console().rule(run.name)
        experiment = load(Experiment, ROOT / "configs" / "translator.yaml", overrides)
        imgshared.train(experiment, out=run, resume=run.exists(), console=Console())
        done.write_text(json.dumps(said) + "\n")
    return imgshared.load_run(run)


def one(a: argparse.Namespace, seed: int, name: str, weights: dict[str, float]) -> dict[str, Any]:
    """Train and evaluate with these weights of the terms, and return the figures."""
    settings = [f"method.epochs={a.epochs}", *(f"method.weights.{k}={v}" for k, v in weights.items())]
    run, store = trained(a, a.out / f"{name}_{seed}", seed, *settings), stored(a, seed)
    report = run.path / "evaluation" / "cells"
    if not (report / "metrics.json").exists():
        factors = [*SHARED, *SPECIFIC.values()]
        imgshared.evaluate(run, store, console=Console(), factors=factors, seed=seed)
    figures = {**read(report), **of_some_cells(run, CellStore(store))}
    return {"seed": seed, **figures, "train s": train_seconds(run.path)}


def ablation(a: argparse.Namespace) -> Rows:
    """Return the figures with all terms on, and without each; without adversarial there is no sharp output."""
    rows = []
    for seed in a.ablation_seeds:
        rows.append({"without": "nothing", **one(a, seed, "all_terms", TERMS)})
        for term in TERMS:
            off = {**TERMS, term: 0, **({"sharp": 0} if term == "adversarial" else {})}
            rows.append({"without": term, **one(a, seed, f"without_{term}", off)})
    return rows


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
        "specific factors, z_s of own protein": float(np.mean([probes[f"z_s [{m}]", f] for m, f in SPECIFIC.items()])),
        "r": float(fidelity["pearson"]),
        "intensity Spearman": float(fidelity["intensity_spearman"]),
    }


def of_some_cells(run: Run, store: CellStore, cells: int = 500) -> dict[str, float]:
    """Return how many-fold the detail of predicted (sharp) stains is off, 1 is right, and HSIC of z_s and z_m.

    By some held-out cells; means over the proteins, HSIC of each protein's own two latents.
    """
    held_out = np.flatnonzero(store.obs["group"].isin(HELD_OUT))
    some = held_out[:: max(1, len(held_out) // cells)]
    done = predict_cells(run, store, some, full=False, shared=False, sharp=run.method.sharp)
    images = done.images["sharp" if run.method.sharp else "predicted"]
    ratios, dependence = [], []
    for marker in run.panel.proteins:
        c = run.panel.index(marker)
        rows = done.measured[:, c]
        ratios.append(float(np.nanmedian(scores.spectral_ratio(done.real[rows, c], images[rows, c]))))
        both = [torch.from_numpy(z[marker][rows]) for z in (done.shared, done.specific)]
        dependence.append(float(losses.hsic(*both)))
    return {"detail, fold off": fold_off(ratios), "HSIC, z_s and z_m of a protein": float(np.mean(dependence))}


def subsets(a: argparse.Namespace, chromatin_only: float, seed: int) -> Rows:
    """Return the error on each protein by the number of other stains that are given."""
    settings = (*MEAN, f"method.epochs={a.subset_epochs}", f"method.chromatin_only={chromatin_only}")
    run = trained(a, a.out / f"subsets_{chromatin_only}_{seed}", seed, *settings)
    method, which = run.method, {"chromatin_only": chromatin_only, "seed": seed}
    assert isinstance(method, MapMethod)
    store = CellStore(stored(a, seed))
    held_out = np.flatnonzero(store.obs["group"].isin(HELD_OUT))
    measured = store.measured[held_out]
    rows: Rows = []
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
        stacking = method.stacking.clone()
        method.stacking.fill_(1)
        row["all, unweighted"] = _error(run, store, cells, marker, given[-1])
        method.stacking.copy_(stacking)
        names = {**which, "hidden": marker, "others": ", ".join(others)}
        rows.append({**names, **row, "all / chromatin": errors[-1] / errors[0]})
    mean = {str(k): v for k, v in pd.DataFrame(rows).drop(columns=list(which)).mean(numeric_only=True).items()}
    return [*rows, {**which, "hidden": "mean", "others": "", **mean}]


def _error(run: Run, store: CellStore, cells: Any, marker: str, sources: list[str]) -> float:
    done = predict_cells(run, store, cells, sources=sources, full=False, shared=False, latents=False)
    c = run.panel.index(marker)
    return float(np.mean((done.images["predicted"][:, c] - done.real[:, c]) ** 2))


if __name__ == "__main__":
    main()
