"""One piece of work of `benchmark_methods.py`, in a process of its own: a store, a common ground, a speed, or a task.

    python scripts/methods_job.py JOB.json

A job's last act is to write its result; what it prints goes to the log beside.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import math
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import study_bbbc013
import study_imc_spleen
import torch
from common import CODE, ROOT
from methods_scores import frame_of, in_units, score
from numpy.typing import NDArray
from rich.console import Console

import imgshared
from imgshared import metrics
from imgshared.build import build_measured, build_normaliser, build_panel, build_split
from imgshared.config import Experiment, TrainConfig, load
from imgshared.data.features import stain_features, typical_radius
from imgshared.data.feed import Feed
from imgshared.data.normalise import Normaliser
from imgshared.data.panel import Panel
from imgshared.data.store import CellStore, StoreWriter, panel_table
from imgshared.evaluation.agreement import Reader, Standard
from imgshared.evaluation.floors import Floors
from imgshared.prediction import load_run, predict_cells
from imgshared.training.folder import last_path
from imgshared.training.loop import Trainer
from imgshared.training.meter import Meter

BLOCK = 256  # crops at a time
WARM, TIMED = 5, 10  # steps of a calibration, the latter at least
SHORTEST = 8.0  # seconds of timed steps, at least: an epoch more or less is a tenth of a budget
WARM_CELLS = 16  # before predictions are timed
LONGEST = 12.0  # seconds of timed steps
CHECKS = 20  # validations of a monitored stage, at most
CHECKED = 0.15  # of the budget, at most, for validations
EPOCHS = {"apollo": ("latent_epochs", "encoder_epochs"), "linear": ()}  # the others: epochs

Job = dict[str, Any]


def clock() -> float:
    """Return wall-clock seconds, or processor time where all runs on one core: neighbours then do not matter."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def experiment_of(job: Job, *more: str) -> Experiment:
    """Return the experiment that a job is of, with more overrides."""
    overrides = [*(f"{key}={value}" for key, value in job["overrides"].items()), *more]
    return load(Experiment, ROOT / "configs" / f"{job['config']}.yaml", overrides)


# --- the data -------------------------------------------------------------------------------------------------------


def store(job: Job) -> None:
    """Prepare the cells of a dataset; of each group at most so many, drawn at random."""
    out = Path(job["result"])
    work, crop = out.parent, f"crop_px={job['crop_px']}"
    if job["dataset"] == "simulated":
        images, whole = work / "images", work / "all" / "cells.zarr"
        if not images.exists():
            imgshared.simulate(images, cells=job["cells"], donors=10, scenario="independent", seed=1)
        if not whole.exists():
            imgshared.prepare(images / "manifest.csv", whole, cells=images / "cells.csv", crop_px=job["crop_px"])
    else:
        study = {"bbbc013": study_bbbc013, "imc_spleen": study_imc_spleen}[job["dataset"]]
        whole = study.prepared(Path(job["data"]) / job["dataset"], work / "all", crop)
    thin(CellStore(whole), out, job["cells_a_group"])


def thin(source: CellStore, out: Path, cells_a_group: int | None) -> None:
    """Write a store of at most so many cells a group."""
    rng = np.random.default_rng(0)
    groups = source.obs["group"].astype(str).to_numpy()
    drawn = [rng.permutation(np.flatnonzero(groups == g))[:cells_a_group] for g in np.unique(groups)]
    rows = np.sort(np.concatenate(drawn))
    with StoreWriter(out, overwrite=True) as writer:
        for part in np.array_split(rows, -(-len(rows) // BLOCK)):
            writer.append(single_cell_images=source.images(part), cell_masks=source.masks(part).astype(np.uint8))
        writer.finish(
            source.obs.iloc[rows],
            panel_table(source.panel),
            source.mean_intensity[rows],
            layers={"measured": source.measured[rows]},
            obsm={"spatial": source.obsm("spatial", rows)},
            info={k: v for k, v in source.info.items() if k != "data_hash"},
        )


def ground(job: Job) -> None:
    """Compute what all methods share: test cells, floors, the scale of the features, classifiers, cells to show."""
    experiment = experiment_of(job)
    cells = CellStore(experiment.data)
    panel, split = build_panel(experiment, cells), build_split(experiment, cells)
    normaliser = build_normaliser(experiment, cells, panel, split, build_measured(experiment, cells, panel))
    parts = np.where(cells.measured[:, cells.panel.chromatin_index], split.assign(cells.obs), "none")
    train, test = np.flatnonzero(parts == "train"), drawn(np.flatnonzero(parts == "test"), job["test_cells"])
    learnt = drawn(train, job["train_cells"])
    floors = Floors(len(panel), [panel.chromatin_index])
    radius = typical_radius(cells.masks(learnt))
    blocks = []
    for rows, images, measured in crops(cells, train, panel, normaliser):
        floors.add(images, measured)
        here = np.isin(rows, learnt)
        blocks.append((described(images[here], measured[here], radius), measured[here]))
    features, shown = (np.concatenate(x) for x in zip(*blocks, strict=True))
    _, images, measured = next(crops(cells, test, panel, normaliser, len(test)))
    kept: dict[str, NDArray[Any]] = {
        "test": test,
        "train": train,
        "normaliser": np.array(json.dumps(normaliser.to_dict())),
        "radius": np.array(radius),
    }
    for marker in panel.proteins:
        c = panel.index(marker)
        real = images[measured[:, c], c]
        linear = floors.linear(c, images[measured[:, c]])
        correlation = np.nan_to_num(metrics.pearson(real, linear))
        standard = Standard.of(features[shown[:, c], c])
        kept |= {f"{marker}/real": stain_features(real, frame_of(real, radius)), f"{marker}/linear": correlation}
        kept |= {f"{marker}/mean": standard.mean, f"{marker}/sd": standard.sd}
        order = np.flatnonzero(measured[:, c])[np.argsort(correlation, kind="stable")]
        kept[f"{marker}/shown"] = test[order[[int(q * (len(order) - 1)) for q in job["quantiles"]]]]
        for label, values in job["labels"]:
            said = cells.obs[label].astype(str).to_numpy()
            known = np.isin(said, values)
            mine = shown[:, c] & known[learnt]
            reader = Reader.fit(standard(features[mine, c]), said[learnt][mine])
            kept |= {f"{marker}/{label}/{k}": v for k, v in zip(("classes", "weights", "bias"),
                     (reader.classes.astype(str), reader.weights, reader.bias), strict=True)}  # fmt: skip
            kept[f"{marker}/{label}/truth"] = np.where(known, said, "")[test[measured[:, c]]].astype(str)
    write(Path(job["result"]), kept)


def drawn(cells: NDArray[np.intp], most: int) -> NDArray[np.intp]:
    """Draw at most so many, always the same."""
    return np.sort(np.random.default_rng(0).permutation(cells)[:most])


def crops(cells: CellStore, rows: NDArray[np.intp], panel: Panel, normaliser: Normaliser, block: int = BLOCK) -> Any:
    """Yield rows, normalised (n, C, Y, X) crops and which markers they show."""
    channels = cells.panel.indices(panel.markers)
    feed = Feed(cells, rows, channels, normaliser, torch.device("cpu"), "stream", block)
    for batch in feed.once(block):
        yield rows[batch.index.numpy()], np.ascontiguousarray(batch.images.numpy()), batch.measured.numpy()


def described(images: NDArray[np.float32], measured: NDArray[np.bool_], radius: float) -> NDArray[np.float32]:
    """Features of every stain, (n, C, 45); zero where it was not measured."""
    out = np.zeros((*images.shape[:2], 45), np.float32)
    for c, known in enumerate(measured.T):
        if known.any():
            out[known, c] = stain_features(images[known, c], frame_of(images[known, c], radius))
    return out


# --- the speed ------------------------------------------------------------------------------------------------------


class Calibration(Trainer):
    """A trainer that takes a few steps of every stage with a clock beside."""

    def measure(self) -> list[dict[str, Any]]:
        """Return the cells a second of each stage's training and of its validation."""
        self.watch = self._watch()
        return [self._measure(stage) for stage in self.method.stages]

    def _measure(self, stage: Any) -> dict[str, Any]:
        self.method.start(stage)
        optimizers, meter, feed = self._optimizers(stage), Meter(), self.feeds["train"]
        augment = self.augment if stage.augment else None
        seconds = []
        began = clock()
        for batch in itertools.chain.from_iterable(feed.epoch(e, augment=augment) for e in itertools.count()):
            self._step([batch], stage, optimizers, meter)
            if self.fabric.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - began)
            began = clock()
            timed = seconds[WARM:]
            if (len(timed) >= TIMED and sum(timed) > SHORTEST) or sum(timed) > LONGEST:
                break
        began = clock()
        if stage.monitored:
            self._validate(stage)
        check = clock() - began
        return {
            "stage": stage.name,
            "cells_per_s": self.config.batch_size / float(np.mean(timed)),
            "val_cells_per_s": len(self.feeds["val"]) / check if stage.monitored else math.inf,
            "monitored": stage.monitored,
        }


def speed(job: Job) -> None:
    """Measure how fast a method trains here."""
    result = Path(job["result"])
    experiment, folder = experiment_of(job), result.with_suffix(".run")
    shutil.rmtree(folder, ignore_errors=True)
    trainer = Calibration(experiment, folder, False, Console(file=io.StringIO()))
    stages = trainer.measure()
    trainer.log.close()
    shutil.rmtree(folder, ignore_errors=True)
    write(result, {"stages": stages, "device": str(trainer.fabric.device)})


def plan(
    stages: list[dict[str, Any]], batch_size: int, train: int, val: int, seconds: float
) -> tuple[list[int], int, int]:
    """Return the epochs of each stage that take so many seconds in all, after how many to validate, and their steps.

    A single stage has epochs of so many steps that it takes its time, however long all cells would: one epoch of a part
    of them where not all fit. Of several stages an epoch is all cells.

    A monitored stage is validated up to `CHECKS` times as long as that takes no more than `CHECKED` of its time, but
    once at least; any other never, since nothing depends on it. The time that is planned for validation is that of the
    validations which are made.
    """
    full = max(1, train // batch_size)
    epochs, every, steps = [], 1, full
    for stage in stages:
        share, step = seconds / len(stages), batch_size / stage["cells_per_s"]
        check, made = val / stage["val_cells_per_s"], 0
        whole = math.ceil if len(stages) == 1 else round
        if stage["monitored"]:
            most = min(max(int(CHECKED * share / check), 1), CHECKS)
            checks = (max(1, whole(share / (n * full * step + check))) for n in itertools.count(1))
            every, made = next((n, k) for n, k in enumerate(checks, 1) if k <= most)
            epochs.append(every * made)
        else:
            epochs.append(max(1, whole(share / (full * step))))
            every = epochs[-1] + 1
        if len(stages) == 1:
            steps = min(max(round((share - made * check) / (epochs[0] * step)), 1), full)
    return epochs, every, steps


def budget(
    experiment: Experiment, stages: list[dict[str, Any]], train: int, val: int, seconds: float
) -> tuple[list[int], list[str]]:
    """Return the epochs of each stage, and the settings, of a training that takes so many seconds."""
    epochs, every, steps = plan(stages, experiment.train.batch_size, train, val, seconds)
    names = EPOCHS.get(experiment.method.name, ("epochs",))
    settings = [f"method.{name}={n}" for name, n in zip(names, epochs, strict=False)]
    settings.append(f"train.validate_every={every}")
    if len(epochs) == len(names) == 1:
        settings.append(f"train.steps_per_epoch={steps}")
    if all(n == 1 for n, stage in zip(epochs, stages, strict=True) if stage["monitored"]):
        # A held-out loss could not end it, so that another patience, of the YAML, is refused.
        settings.append(f"train.patience={TrainConfig().patience}")
    return epochs[: len(names)] or [1], settings


# --- a task ---------------------------------------------------------------------------------------------------------


def task(job: Job) -> None:
    """Train a method for its budget, predict the test cells, score."""
    folder = Path(job["result"]).parent
    shared = np.load(job["ground"])
    experiment = experiment_of(job)
    speeds = json.loads(Path(job["speed"]).read_text())["stages"]
    cells = CellStore(experiment.data)
    val = int((build_split(experiment, cells).assign(cells.obs) == "val").sum())
    epochs, settings = budget(experiment, speeds, len(shared["train"]), val, job["seconds"])
    experiment = experiment_of(job, *settings)
    shutil.rmtree(folder / "run", ignore_errors=True)
    began = clock()
    trainer = Trainer(experiment, folder / "run", False, Console())
    loaded = clock()
    trainer.fit()
    trained = clock()
    row = {
        **job["name"],
        "seed": experiment.seed,
        **CODE,
        "precision": "bf16" if "bf16" in trainer.fabric._precision.precision else "float32",
        "epochs": epochs,
        "steps_per_epoch": trainer.feeds["train"].steps,
        "train_cells": len(trainer.feeds["train"]),
        "load_seconds": loaded - began,
        "train_seconds": trained - loaded,
        "train_cells_per_s": trainer.position.total * experiment.train.batch_size / (trained - loaded),
        "memory_mb": peak_memory(),
        "parameters": sum(p.numel() for p in trainer.method.parameters()),
    }
    last_path(folder / "run").unlink()
    del trainer
    gc.collect()
    run = load_run(folder / "run")
    test = shared["test"]
    predict_cells(run, cells, test[:WARM_CELLS], full=False, shared=False, latents=False)
    began = clock()
    done = predict_cells(run, cells, test, full=False, shared=False, latents=False, sharp=run.method.sharp)
    row["predict_cells_per_s"] = len(test) / (clock() - began)  # with every output that it has
    ours = Normaliser.from_dict(json.loads(str(shared["normaliser"])))
    real = in_units(done.real, run.normaliser, ours)
    outputs = {name: in_units(x, run.normaliser, ours) for name, x in done.images.items()}
    for name, predicted in outputs.items():
        scores = score(real, predicted, done.measured, run.panel, shared, job["labels"])
        row["markers" if name == "predicted" else name] = scores
    pictures = {}
    for marker in job["shown"]:
        rows = np.searchsorted(test, shared[f"{marker}/shown"])
        c = run.panel.index(marker)
        pictures[f"{marker}/dna"] = real[rows, run.panel.chromatin_index]
        pictures |= {f"{marker}/real": real[rows, c], **{f"{marker}/{k}": x[rows, c] for k, x in outputs.items()}}
    write(folder / "shown.npz", pictures)
    row |= {"seconds": time.perf_counter() - STARTED, "processor_seconds": time.process_time()}
    write(Path(job["result"]), row)


def peak_memory() -> float:
    """Return the greatest memory that training took, in MB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        with open("/proc/self/status") as lines:  # ru_maxrss counts what the starting process held, too
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result, JSON or arrays by the path's suffix; beside first, then renamed."""
    partial = path.with_name("partial_" + path.name)
    if path.suffix == ".npz":
        np.savez(partial, **result)
    else:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


STARTED = time.perf_counter()

if __name__ == "__main__":
    described_job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    {"store": store, "ground": ground, "speed": speed, "task": task}[described_job["kind"]](described_job)
