"""The main job on simulated cells, from images to report, sized for two CPU cores."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from imgshared import api
from imgshared.config import Experiment, validate
from imgshared.types import InputError

EXPERIMENT = {
    "split": {"by": "group", "test": ["D07", "D08", "D09", "D10"], "val": ["D06"]},
    "method": {"name": "apollo", "proteins_per_step": 1, "latent_epochs": 32, "encoder_epochs": 20},
    "train": {"patience": 5},
}
SHARED = ("nuclear_area", "shape_x", "shape_y", "heterochromatin")
SPECIFIC = ("lamin_level", "foxo_switch", "foci", "tubulin_level", "cd45_level")


def demo(out: Path, console: Console) -> Path:
    """Simulate, prepare, train, predict and evaluate into a folder; return the report."""
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty: give another folder (`imgshared demo FOLDER`), or remove it")
    began = time.monotonic()
    images, store = out / "images", out / "cells.zarr"
    console.rule("1/5 simulate: 10 donors, two staining batches, two treatments")
    api.simulate(images, console=console, cells=1800, donors=10)
    console.rule("2/5 prepare: images and masks to single-cell crops")
    console.print(
        str(api.prepare(images / "manifest.csv", store, console=console, cells=images / "cells.csv")), highlight=False
    )
    console.rule("3/5 train: apollo, donors D07 to D10 held out")
    experiment = validate(Experiment, {"data": str(store), **EXPERIMENT}, "the demo")
    run = api.train(experiment, out=out / "run", console=console)
    console.rule("4/5 predict: every protein of every cell from its chromatin")
    predictions = api.predict(run, store, out / "predictions.zarr", console=console)
    console.rule("5/5 evaluate: on the held-out donors")
    labels = ["treatment", "drug"]
    result = api.evaluate(
        run, store, out / "report", console=console, labels=labels, factors=[*SHARED, *SPECIFIC], train_on="train"
    )
    console.rule(f"done in {(time.monotonic() - began) / 60:.1f} minutes")
    console.print(
        f"Report:      {result.report}\n"
        f"Predictions: {predictions} (anndata.read_zarr opens it)\n\n"
        "What to look at in the report:\n"
        "  1. The pictures: real, predicted and difference at one contrast. CD45 is predicted in shape but not in\n"
        "     level, FOXO3 without knowing whether it is in the nucleus: neither leaves a trace in chromatin.\n"
        "  2. The classifiers: `treatment` acts through shared factors, so predicted stains tell it almost as well as\n"
        "     real ones; `drug` moves FOXO3 alone, so only real FOXO3 tells it. Predictions must stay at chance.\n"
        "  3. The probes: shared factors are read from z_s of chromatin, specific ones only from their own protein.",
        highlight=False,
        soft_wrap=True,
    )
    return result.report
