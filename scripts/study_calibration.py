"""Do calibrated intervals hold on unseen donors and batches, does dropping unsure cells help, are odd sources told?

    python scripts/study_calibration.py OUT [--seeds 1 2 3] [--cells 3600] [--donors 48] [--epochs 5]

Simulated cells: a half of the donors train, a quarter calibrates, a quarter is judged. Every donor is a batch of its
own: a gain and an offset in each of its channels (`SHIFTS`). apollo, and translator by its mean; 90% intervals. Odd
sources are the judged cells, chromatin blurred, saturated, replaced by another stain, and magnified; the score is how
well `obs["ood"]` of `imgshared predict` tells them from the same cells untouched.

For the first seed, too: what tells an unsure pixel? Of these two it is the predicted intensity. Beside them apollo's
weights with the scale of latent noise (`method.draws`), translator with a head that predicts its scale
(`method.head=laplace`), and an ensemble of translators of `MEMBERS` seeds. And what no calibration can promise: a
translator that has seen the same cells as one batch, judged on donors of that batch and on the batches.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from common import MEAN, ROOT, markdown, record
from numpy.typing import NDArray
from rich.console import Console
from scipy import ndimage
from sklearn.metrics import roc_auc_score

import imgshared
from imgshared.config import Experiment, dump, load
from imgshared.data.store import CellStore, StoreWriter, panel_table
from imgshared.evaluation.calibrate import calibrate
from imgshared.prediction import Run

METHODS = {
    "apollo": ("method.proteins_per_step=1", "method.latent_epochs={latent}", "method.encoder_epochs={encoder}"),
    "translator": ("method.epochs={epochs}", *MEAN),
}
MEMBERS = 3
DRAWS = 8
SHIFTS = (0.15, 40.0)  # standard deviations over donors and channels: of the log of the gain, of the offset (counts)
CELLS = 600  # of the judged donors whose sources are made odd
Images = NDArray[Any]
Row = dict[Any, Any]


def blurred(images: Images, other: Images) -> Images:
    """Out of focus."""
    return np.asarray(ndimage.gaussian_filter(images, (0, 2, 2)))


def saturated(images: Images, other: Images) -> Images:
    """Overexposed: the brightest quarter of all pixels is one value."""
    return np.asarray(np.minimum(images * 4, np.percentile(images * 4, 75)))


def wrong_stain(images: Images, other: Images) -> Images:
    """Another stain in the channel of the source."""
    return other


def magnified(images: Images, other: Images) -> Images:
    """An objective half as strong again."""
    side = images.shape[1]
    zoomed = np.stack([ndimage.zoom(image, 1.5, order=1) for image in images])
    start = (zoomed.shape[1] - side) // 2
    return zoomed[:, start : start + side, start : start + side]


ODD: dict[str, Callable[[Images, Images], Images]] = {
    "blurred": blurred, "saturated": saturated, "wrong stain": wrong_stain, "magnified": magnified,
}  # fmt: skip


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--cells", type=int, default=3600)
    parser.add_argument("--donors", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=5, help="of translator; apollo trains 4 and 3 times as many")
    parser.add_argument("--record", type=Path, default=None, help="JSON to write (default: OUT/calibration.json)")
    a = parser.parse_args()
    coverage, risk, odd = [], [], []
    for seed in a.seeds:
        one, many = stored(a, seed)
        for name, run, store in cases(a, one, many, seed, more=seed == a.seeds[0]):
            report = run.path.with_name(f"{run.path.name}_judged_{store.stem}")
            found = imgshared.evaluate(run, store, report, console=Console())
            about = {"method": name, "seed": seed}
            coverage += [about | row for row in found.coverage.to_dict("records")]
            risk += [about | row for row in found.risk.to_dict("records")]
            if name in METHODS:
                away = run.path.with_name(f"{run.path.name}_odd")
                odd += [about | row for row in oddness(run, CellStore(store), away)]
            result = summary(coverage, risk, odd)
            record(a.record or a.out / "calibration.json", result)  # hours are not lost with the last one
    print("\nshare within 90% intervals, unseen donors, mean over seeds\n\n" + markdown(result["within"]))
    print("\nodd sources, AUROC, least over seeds\n\n" + markdown(result["told"]))
    print("\nerror of the surest cells over that of all, mean over seeds and stains; greatest rise of any step\n")
    print(markdown(result["falls"]))


def summary(coverage: list[Row], risk: list[Row], odd: list[Row]) -> dict[str, Any]:
    """Put the rows in a few tables."""
    curves = pd.DataFrame(risk).set_index(["method", "seed", "marker", "kept"])["error"]
    steps = curves.groupby(["method", "seed", "marker"], sort=False).pct_change()
    ratio = curves / curves.groupby(["method", "seed", "marker"], sort=False).transform("first")
    falls = ratio.rename("ratio").reset_index().pivot_table("ratio", "method", "kept", sort=False)
    falls.columns = [f"{kept:.0%}" for kept in falls.columns]
    falls["greatest rise"] = steps.groupby("method", sort=False).max()
    falls["error of all, 1e-3"] = 1e3 * curves.xs(1.0, level="kept").groupby("method", sort=False).mean()
    told = pd.DataFrame(odd).pivot_table("AUROC", "method", "source", "min", sort=False)
    return {
        "within": within(coverage), "told": told.reset_index().to_dict("records"),
        "falls": falls.reset_index().to_dict("records"),
        "coverage": coverage, "risk": risk, "odd": odd,
    }  # fmt: skip


def within(coverage: list[Row]) -> list[Row]:
    """Mean over seeds of the share of pixels and cells within their intervals, and of cells better not predicted."""
    shares = pd.DataFrame(coverage)
    shares = shares[shares["score"].isin(["pixels", "cell", "abstain"])]
    by_marker = shares.pivot_table("value", ["method", "marker"], "score", sort=False).reset_index()
    both = by_marker.groupby("method", sort=False).mean(numeric_only=True).reset_index().assign(marker="mean")
    return list(pd.concat([by_marker, both]).to_dict("records"))


def stored(a: argparse.Namespace, seed: int) -> tuple[Path, Path]:
    """Simulate and prepare, once a seed: all donors as one batch, and each as a batch of its own."""
    folder = a.out / f"data_{seed}"
    images, one = folder / "images", folder / "one_batch.zarr"
    if not one.exists():
        if not images.exists():
            imgshared.simulate(images, cells=a.cells, donors=a.donors, seed=seed, console=Console())
        imgshared.prepare(images / "manifest.csv", one, cells=images / "cells.csv", qc=False, console=Console())
    return one, rebatched(CellStore(one), folder / "batches.zarr", seed)


def rebatched(store: CellStore, path: Path, seed: int) -> Path:
    """Write every donor as a batch: each of its channels with a gain and an offset of its own."""
    if path.exists():
        return path
    names, donor = np.unique(store.obs["group"].astype(str).to_numpy(), return_inverse=True)
    rng = np.random.default_rng(seed)
    gain, offset = (rng.normal(0, sd, (len(names), len(store.panel))) for sd in SHIFTS)
    cells = np.arange(len(store.obs))
    images = store.images(cells)
    moved = images * np.exp(gain)[donor][..., None, None] + offset[donor][..., None, None]
    moved = np.where(store.measured[cells][..., None, None], moved, 0).clip(0, np.iinfo(images.dtype).max).round()
    return written(store, cells, moved.astype(images.dtype), path)


def cases(a: argparse.Namespace, one: Path, many: Path, seed: int, *, more: bool) -> Iterator[tuple[str, Run, Path]]:
    """Yield a name, a run and the store that judges it; with `more` also other scales, and what saw a single batch."""
    runs = {}
    for name in METHODS:
        runs[name] = trained(a, name, many, seed)
        yield name, runs[name], many
    if not more:
        return
    yield "apollo, latent noise", with_draws(runs["apollo"]), many
    yield "translator, laplace", trained(a, "translator", many, seed, "laplace", "method.head=laplace"), many
    others = [trained(a, "translator", many, seed, f"member{k}", f"seed={seed + 100 * k}") for k in range(1, MEMBERS)]
    out = a.out / f"translator_{seed}_ensemble"
    members = [runs["translator"], *others]
    together = imgshared.load_run(out) if out.exists() else imgshared.ensemble(members, out)
    yield "translator, ensemble", together, many
    narrow = trained(a, "translator", one, seed, "one_batch")
    yield "translator of one batch", narrow, one
    yield "translator of one batch, judged on others", narrow, many


def with_draws(run: Run) -> Run:
    """Give a run's weights a scale of latent noise, and calibrate it anew."""
    out = run.path.with_name(f"{run.path.name}_noise")
    if not out.exists():
        shutil.copytree(run.path / "checkpoints", out / "checkpoints")
        (out / "config.yaml").write_text(dump(load(Experiment, run.path / "config.yaml", [f"method.draws={DRAWS}"])))
    noisy = imgshared.load_run(out)
    calibrate(noisy, CellStore(run.experiment.data))
    return noisy


def trained(a: argparse.Namespace, name: str, store: Path, seed: int, what: str = "", *wish: str) -> Run:
    """Train on half of the donors."""
    donors = sorted(CellStore(store).obs["group"].astype(str).unique())
    quarter = len(donors) // 4
    test, val = donors[-quarter:], donors[-2 * quarter : -quarter]
    epochs = {"epochs": a.epochs, "latent": 4 * a.epochs, "encoder": 3 * a.epochs}
    overrides = [f"data={store}", f"seed={seed}", f"split.test={test}", f"split.val={val}"]
    overrides += [*(setting.format(**epochs) for setting in METHODS[name]), *wish]
    experiment = load(Experiment, ROOT / "configs" / f"{name}.yaml", overrides)
    run = a.out / f"{name}_{seed}{what and f'_{what}'}"
    return imgshared.train(experiment, out=run, resume=run.exists(), console=Console())


def oddness(run: Run, store: CellStore, out: Path) -> list[dict[str, Any]]:
    """Return how well odd sources of judged cells are told from the same cells untouched."""
    held = np.flatnonzero(run.split.assign(store.obs) == "test")
    cells = np.sort(np.random.default_rng(0).permutation(held)[:CELLS])
    images = store.images(cells)
    source = store.panel.chromatin_index
    stains = np.argmax(store.measured[cells] & (np.arange(len(store.panel)) != source), 1)
    other = images[np.arange(len(cells)), stains].astype(np.float64)
    plain = score(run, store, cells, images, out / "plain.zarr")
    rows = []
    for name, change in ODD.items():
        changed = images.copy()
        top = np.iinfo(images.dtype).max
        changed[:, source] = np.clip(change(images[:, source].astype(np.float64), other), 0, top).round()
        odd = score(run, store, cells, changed, out / f"{name.replace(' ', '_')}.zarr")
        truth = np.repeat([0, 1], len(cells))
        rows.append({"source": name, "AUROC": float(roc_auc_score(truth, np.concatenate([plain, odd])))})
    return rows


def score(run: Run, store: CellStore, cells: NDArray[np.intp], images: Images, path: Path) -> NDArray[np.float64]:
    """Write the cells with these images as a store, predict it, and return `obs["ood"]`."""
    written(store, cells, images, path)
    predicted = imgshared.predict(run, path, path.with_suffix(".predicted.zarr"), overwrite=True)
    return np.asarray(anndata.read_zarr(predicted).obs["ood"], np.float64)


def written(store: CellStore, cells: NDArray[np.intp], images: Images, path: Path) -> Path:
    """Write some cells of a store with other images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    masks = store.masks(cells)
    area = np.maximum(masks.sum((1, 2)), 1)[:, None]
    means = np.where(store.measured[cells], np.einsum("ncyx,nyx->nc", images.astype(np.float64), masks) / area, np.nan)
    with StoreWriter(path, overwrite=True) as writer:
        writer.append(single_cell_images=images, cell_masks=masks.astype(np.uint8))
        writer.finish(
            store.obs.iloc[cells], panel_table(store.panel), means,
            layers={"measured": store.measured[cells]}, obsm={"spatial": store.obsm("spatial", cells)},
            info={k: v for k, v in store.info.items() if k != "data_hash"},
        )  # fmt: skip
    return path


if __name__ == "__main__":
    main()
