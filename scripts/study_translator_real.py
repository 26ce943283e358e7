"""translator on real cells: paired and unpaired bbbc013, imc_spleen region by region, crops against whole fields.

    python scripts/study_translator_real.py DATA OUT [--parts bbbc013 unpaired starts imc_spleen]
        [--seeds 0 1 2] [--regions ROI002 ROI004 ROI008 ROI010] [--record DIR]

DATA holds bbbc013/ and imc_spleen/.

bbbc013      Rows A and E train, rows B and F are reported on; seed 0.
unpaired     DNA of the odd columns and FKHR of the even ones, never both of one cell, every seed. Beside the
             predictions the same ones given to other cells, of any well and of the same well: what is left in the
             latter, the well alone tells. Intervals are of the wells, by a jackknife.
starts       translator_unpaired alone, briefly, every seed: whether some start ends in the negative of a stain.
imc_spleen   One region is reported on, the next one stops the training, two train, every seed; stains are predicted for
             the whole region at once and compared as its data sheet does, with the target smoothed at sigma 1.

A finished run is not computed again, and one of other settings is refused. What the record holds of other regions, made
with the same settings, stays there: one can be done today and another tomorrow, or elsewhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import study_bbbc013
import tifffile
import yaml
from common import (
    CODE,
    MEAN,
    ROOT,
    experiment_settings,
    finished,
    markdown,
    metrics,
    provenance,
    record,
    train_seconds,
)
from numpy.typing import NDArray
from rich.console import Console
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from study_imc_spleen import REGIONS, prepared

import imgshared
from imgshared import metrics as scores
from imgshared.config import Experiment, dump, load, validate
from imgshared.data.store import CellStore
from imgshared.prediction import Run, predict_cells, predict_image
from imgshared.types import InputError

HELD_OUT = [f"{row}{column:02d}" for row in "BF" for column in range(1, 13)]
UNPAIRED = {"translator_unpaired": 10, "cut": 4, "cyclegan": 3}  # epochs that take about the same time on a CPU
IMC = {
    # Every stain is drawn in every step, as regression does; with 4 of the 12, its error was still falling at the end.
    "translator": (*MEAN, "method.epochs=8", "method.hidden_proteins=12", "train.validate_every=1"),
    "regression": ("method.epochs=8", "augment.flips=true", "train.batch_size=16"),
    "linear": (),
}


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "bbbc013": paired,
        "unpaired": unpaired,
        "starts": starts,
        "imc_spleen": regions,
    }
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of all parts but bbbc013")
    parser.add_argument("--regions", nargs="+", choices=REGIONS, default=REGIONS, help="left out, of imc_spleen")
    parser.add_argument("--record", type=Path, default=None, help="folder for the JSON (default: OUT)")
    a = parser.parse_args()
    a.out = a.out.resolve()
    for part in a.parts:
        result = parts[part](a)
        for title, rows in result.items():
            if title not in ("regions", "runs"):
                print(f"\n{part}: {title}\n\n{markdown(rows)}")
        record(recorded(a, part), result)


def recorded(a: argparse.Namespace, part: str) -> Path:
    """Return where a part's results go."""
    return Path(a.record or a.out) / f"translator_{part}.json"


def trained(config: str, store: Path, run: Path, *overrides: str) -> Run:
    """Train what is not there yet, and open it."""
    said, done = experiment_settings(config, [f"data={store}", *overrides]), run / "done"
    if not finished(done, done, said):
        Console().rule(str(run))
        experiment = load(Experiment, ROOT / "configs" / f"{config}.yaml", [f"data={store}", *overrides])
        imgshared.train(experiment, out=run, resume=run.exists(), console=Console())
        (run / "code.json").write_text(json.dumps(CODE) + "\n")
        done.write_text(json.dumps(said) + "\n")
    return imgshared.load_run(run)


def told(run: Path) -> dict[str, Any]:
    """Return how a run was trained, by which commit, and the seconds that it took."""
    experiment, said = load(Experiment, run / "config.yaml"), json.loads((run / "done").read_text())
    said["overrides"].pop("data", None)  # a place on this machine
    return {
        "run": run.name,
        **said,
        **json.loads((run / "code.json").read_text()),
        "epochs": getattr(experiment.method, "epochs", None),
        "seed": experiment.seed,
        "train_seconds": train_seconds(run),
    }


# --- bbbc013 ----------------------------------------------------------------------------------------------------------


def paired(a: argparse.Namespace) -> dict[str, Any]:
    """DNA to FKHR: correlation beside the linear floor, and what dose is read from."""
    store = study_bbbc013.prepared(a.data.resolve() / "bbbc013", a.out / "bbbc013")
    split = [f"split.test={HELD_OUT}", f"split.val={list(study_bbbc013.VAL)}"]
    run = trained("translator", store, a.out / "bbbc013" / "translator", *split, *MEAN, "method.epochs=20")
    report = run.path / "evaluation" / "cells"
    if not (report / "metrics.json").exists():
        wish: dict[str, Any] = {"labels": ["dose"], "label_values": ["low", "high"], "train_on": "train"}
        imgshared.evaluate(run, store, console=Console(), **wish)
    stains = metrics(report)["stains"]
    return {
        "mean Pearson r a cell": stains.to_dict("records"),
        "dose, AUROC": study_bbbc013.read(report),
        "whole fields against crops": fields(a, run),
        "runs": [told(run.path)],
    }


def fields(a: argparse.Namespace, run: Run, margin: int = 128, wells: tuple[str, ...] = ("B01", "B06", "F12")) -> Any:
    """The same weights on whole fields and on large tiles of them, compared further in than the network looks.

    Tiles begin at multiples of the network's coarsest step (16 px): another start would be another sampling grid.
    """
    rows = []
    for well in wells:
        image = tifffile.imread(a.data / "bbbc013" / f"{well}.ome.tif")
        names = list(CellStore(run.experiment.data).panel.markers)
        whole = predict_image(run, image, names)[0]
        y = x = 96
        tile = predict_image(run, image[:, y : y + 448, x : x + 448], names)[0]
        inner = slice(margin, -margin)
        part = whole[y : y + 448, x : x + 448]
        gap = np.abs(tile - part)[inner, inner]
        real = image[names.index(run.panel.proteins[0])].astype(np.float64)
        r = float(np.corrcoef(whole.ravel(), real.ravel())[0, 1])
        span = float(whole.max() - whole.min())
        rows.append({"well": well, "r, whole field": r, "greatest gap / range": float(gap.max()) / span})
    return rows


def unpaired(a: argparse.Namespace) -> dict[str, Any]:
    """Learn from DNA of some wells and FKHR of others; judge on held-out wells that have both."""
    return _unpaired(a, UNPAIRED, "unpaired")


def starts(a: argparse.Namespace) -> dict[str, Any]:
    """Do so briefly, from several starts: a discriminator alone tells a stain from its negative."""
    return _unpaired(a, {"translator_unpaired": 2}, "starts")


def _unpaired(a: argparse.Namespace, epochs_of: dict[str, int], folder: str) -> dict[str, Any]:
    store = study_bbbc013.prepared(a.data.resolve() / "bbbc013", a.out / "bbbc013")
    wells = [f"{row}{column:02d}" for row in "AE" for column in range(1, 13)]
    hidden = {"DNA": [w for w in wells if int(w[1:]) % 2 == 0], "FKHR-EGFP": [w for w in wells if int(w[1:]) % 2]}
    split = [f"split.test={HELD_OUT}", "split.val=[]", f"unstained={json.dumps(hidden)}"]
    rows, runs = [], []
    for name, epochs in epochs_of.items():
        for seed in a.seeds:
            settings = [*split, f"method.epochs={epochs}", f"seed={seed}"]
            run = trained(name, store, a.out / folder / f"{name}_{seed}", *settings)
            rows += [{"method": name, "seed": seed, **row} for row in against_shuffled(run, CellStore(store))]
            runs.append(told(run.path))
    return {"FKHR predicted from DNA, held-out wells, learnt without pairs": rows, "runs": runs}


def against_shuffled(run: Run, store: CellStore, n: int = 2000) -> list[dict[str, Any]]:
    """Pixel Pearson and intensity Spearman of predictions, and of the same predictions given to other cells."""
    test = np.flatnonzero(run.split.assign(store.obs) == "test")
    cells = np.sort(np.random.default_rng(0).choice(test, min(n, len(test)), replace=False))
    done = predict_cells(run, store, cells, full=False, shared=False, latents=False)
    c = run.panel.index(run.panel.proteins[0])
    real, predicted = done.real[:, c], done.images["predicted"][:, c]
    wells = store.obs["group"].to_numpy()[cells]
    rng = np.random.default_rng(1)
    orders = {
        "predicted": np.arange(len(cells)),
        "shuffled": rng.permutation(len(cells)),
        "shuffled in its well": shuffled_within(wells, rng),
    }
    rows = []
    for name, order in orders.items():
        guess = predicted[order]
        r = scores.estimate(wells, scores.mean(wells, scores.pearson(real, guess)))
        means = (images.mean((1, 2), dtype=np.float64) for images in (real, guess))
        rho = scores.estimate(wells, scores.correlation(wells, *means, ranks=True))
        rows.append({"prediction": name, **with_interval("r", r), **with_interval("intensity Spearman", rho)})
    return rows


def shuffled_within(groups: NDArray[Any], rng: np.random.Generator) -> NDArray[np.intp]:
    """Return an order of the cells that changes places only within a group."""
    order = np.arange(len(groups))
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        order[rows] = rng.permutation(rows)
    return order


def with_interval(name: str, estimate: scores.Estimate) -> dict[str, float]:
    """Return a score and its 95% interval as columns."""
    return {name: estimate.value, f"{name}, low": estimate.low, f"{name}, high": estimate.high}


# --- imc_spleen -------------------------------------------------------------------------------------------------------


def regions(a: argparse.Namespace) -> dict[str, Any]:
    """Leave one region out: every protein from DNA1, translator beside regression and linear."""
    folder = a.data.resolve() / "imc_spleen"
    store = prepared(folder, a.out / "imc_spleen", "crop_px=64")
    now = [one_region(folder, store, region, seed) for region, seed in itertools.product(a.regions, a.seeds)]
    made = {(one["region"], one["seed"]) for one in now}
    earlier = [one for one in _kept(recorded(a, "imc_spleen")) if (one["region"], one["seed"]) not in made]
    both = sorted([*earlier, *now], key=lambda one: (one["region"], one["seed"]))
    about = [{"region": one["region"], "seed": one["seed"]} for one in both]
    table = pd.DataFrame([{**said, **row} for said, one in zip(about, both, strict=True) for row in one["r"]])
    mean = table.pivot_table(index="marker", columns="method", values="r", sort=False)
    by_region = table.pivot_table(index=["marker", "region"], columns="method", values="r", sort=False)
    gain = (by_region["translator"] - by_region["linear"]).groupby("marker", sort=False)
    shown = [
        {"marker": m, **mean.loc[m, list(IMC)].to_dict(), "gain over linear": float(gain.mean()[m]),
         "least": float(gain.min()[m]), "greatest": float(gain.max()[m])}
        for m in mean.index
    ]  # fmt: skip
    shown.append({"marker": "mean", **pd.DataFrame(shown).mean(numeric_only=True).to_dict()})
    means = {
        key: table.pivot_table(index=key, columns="method", values="r").reset_index() for key in ("region", "seed")
    }
    return {
        "pixel r over the left-out region": shown,
        "mean r a region": means["region"].to_dict("records"),
        "mean r a seed": means["seed"].to_dict("records"),
        "white pulp against the rest, AUROC": [
            {**said, **row} for said, one in zip(about, both, strict=True) for row in one["white pulp"]
        ],
        "regions": both,
    }


def one_region(folder: Path, store: Path, region: str, seed: int) -> dict[str, Any]:
    """Train every method without a region and say how it predicts that, with what, and where it was done."""
    correlations, labels, runs = [], [], []
    for method, settings in imc_settings(region, seed).items():
        run = trained(method, store, store.parent / f"{method}_{region}_{seed}", *settings)
        images = {r: _region(run, folder, r) for r in REGIONS}
        correlations += [{"method": method, **row} for row in _correlations(run, *images[region])]
        labels.append({"method": method, **_pulp(images, folder, region)})
        runs.append(told(run.path))
    where = {name: provenance()[name] for name in ("processor", "precision", "torch")}
    about = {"region": region, "seed": seed, **where, "settings": _resolved(region, seed)}
    return {**about, "r": correlations, "white pulp": labels, "runs": runs}


def imc_settings(region: str, seed: int) -> dict[str, list[str]]:
    """Return what each method's YAML is changed by where a region is left out."""
    val = REGIONS[(REGIONS.index(region) + 1) % len(REGIONS)]
    common = [f"split.test=[{region}]", f"split.val=[{val}]", f"seed={seed}"]
    common += ["normalise.transform=arcsinh", "normalise.cofactor=1", "normalise.low=0"]
    return {method: [*common, *settings] for method, settings in IMC.items()}


def _resolved(region: str, seed: int) -> dict[str, Any]:
    """Return every setting of each method but the store's place: what must agree in one table."""
    found = {}
    for method, settings in imc_settings(region, seed).items():
        experiment = load(Experiment, ROOT / "configs" / f"{method}.yaml", ["data=cells.zarr", *settings])
        found[method] = yaml.safe_load(dump(experiment))
    return found


def _kept(path: Path) -> list[dict[str, Any]]:
    """Read the regions of a record that were made with the settings of now, and say which were not."""
    said = json.loads(path.read_text()).get("regions", []) if path.exists() else []
    kept = [one for one in said if _same(one["settings"], _resolved(one["region"], one["seed"]), path)]
    if left := [f"{one['region']} (seed {one['seed']})" for one in said if one not in kept]:
        print(f"{path}: {', '.join(left)} made with other settings than now, so left out of the record")
    return kept


def _same(said: dict[str, Any], now: dict[str, Any], path: Path) -> bool:
    """Whether settings agree; one that came into being since has its default in those of a record."""
    try:
        return {m: yaml.safe_load(dump(validate(Experiment, tree, str(path)))) for m, tree in said.items()} == now
    except InputError:  # of a setting that is no more
        return False


Region = tuple[NDArray[np.float64], NDArray[np.float64]]


def _region(run: Run, folder: Path, region: str) -> Region:
    """Return arcsinh stains and arcsinh predictions of a whole region, both (C, Y, X) of the model's panel."""
    image = tifffile.imread(folder / f"{region}.ome.tif")
    predicted = predict_image(run, image, run.panel.markers, markers=run.panel.markers)
    return np.arcsinh(image.astype(np.float64)), np.arcsinh(predicted.astype(np.float64))


def _correlations(run: Run, real: NDArray[np.float64], predicted: NDArray[np.float64]) -> list[dict[str, Any]]:
    rows = []
    for marker in run.panel.proteins:
        c = run.panel.index(marker)
        smooth = gaussian_filter(real[c], 1)
        raw, r = (float(np.corrcoef(target.ravel(), predicted[c].ravel())[0, 1]) for target in (real[c], smooth))
        rows.append({"marker": marker, "r": r, "r, not smoothed": raw})
    return rows


def _pulp(images: dict[str, Region], folder: Path, region: str) -> dict[str, float]:
    """Read white pulp from measured and predicted proteins of a cell, and from DNA with its surroundings.

    The classifier of predicted proteins learns from regions that the model saw, where predictions are better than in
    the left-out one: its figure is, if anything, too low.
    """
    table = pd.read_csv(folder / "cells.csv")
    inputs: dict[str, list[NDArray[Any]]] = {"real proteins": [], "predicted proteins": [], "DNA with context": []}
    truth, held_out = [], []
    for name, (real, predicted) in images.items():
        labels = tifffile.imread(folder / f"{name}_cells.tif")
        rows = table[table["roi"] == name]
        truth.append((rows["region"] == "white_pulp").to_numpy())
        held_out.append(np.full(len(rows), name == region))
        around = np.stack([gaussian_filter(real[0], s) for s in (0, 2, 5, 10, 15)])
        for key, stack in zip(inputs, (real[1:], predicted[1:], around), strict=True):
            inputs[key].append(_cell_means(stack, labels, rows["label"].to_numpy()))
    y, test = np.concatenate(truth), np.concatenate(held_out)
    out = {}
    for key, blocks in inputs.items():
        x = np.concatenate(blocks)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[~test], y[~test])
        out[key] = float(roc_auc_score(y[test], model.predict_proba(x[test])[:, 1]))
    return out


def _cell_means(stack: NDArray[Any], labels: NDArray[Any], wanted: NDArray[Any]) -> NDArray[Any]:
    """Mean of (K, Y, X) maps in each wanted label: (n, K)."""
    count = np.maximum(np.bincount(labels.ravel()), 1)
    return np.stack([(np.bincount(labels.ravel(), layer.ravel()) / count)[wanted] for layer in stack], 1)


if __name__ == "__main__":
    main()
