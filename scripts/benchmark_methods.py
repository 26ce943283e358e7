"""Which method is best: on the same cells, the same grouped split, for the same wall-clock time, over several seeds.

    python scripts/benchmark_methods.py DATA OUT [--edition cpu|full] [--methods ...] [--datasets ...] [--workers 2]
                                        [--seconds N] [--record DIR] [--readme]
    python scripts/benchmark_methods.py --tables DIR [--readme]

DATA is the folder that holds bbbc013/ and imc_spleen/. Every method is its configs/<name>.yaml with the edition's
changes below; a short calibration measures how fast it trains here, and its epochs, and their steps, are what fits into
the time, be it a part of one epoch. A task is one training of one method, in a process of its own, with its share of
the cores. OUT keeps what is finished, beside the settings that it was made with, and it is never done twice; where
these differ from the settings now (a YAML, a size, the number of tasks at a time, the processor), the script says which
and stops. A task that fails says so and the rest goes on; the results then go to OUT/results alone, and the exit code
is 1. Where a task has one core, its seconds are processor time: on a machine shared with others the methods still get
the same.

Results are methods_<dataset>.json, of another edition than cpu methods_<dataset>_<edition>.json. README's tables are
of the cpu edition with longer `--seconds` (see reproduce.sh); with its own times it takes an hour and a half on two
cores without bf16.

Every score is of cells of held-out groups that show chromatin and the marker, in normalised units, predicted from
chromatin alone. It is of their whole crops: those of simulated cells and bbbc013 hold about one cell, those of
imc_spleen 60 to 85, so that r, SSIM and intensity are there about a neighbourhood.

r            mean over crops of the Pearson r of a crop's pixels (a constant prediction counts as 0)
gain         mean over crops of r minus the r of linear regression on blurred chromatin, fitted on the training cells
SSIM         mean structural similarity, data range 1
detail       how many-fold the power of structures finer than 8 px is off: the spectral ratio of a marker is the median
             over crops of predicted over real power, and this the exp of the mean over markers of its |log|, so that
             too much of one stain does not make up for too little of another. 1 is best; 2 is twice or half as much
intensity    Spearman r of the crops' mean intensities
KID          kernel distance of 45 features a crop, of `data.features` (brightness, radial distribution, texture, spots,
             within a disc of the usual nucleus in the middle and around it; no network, no outline), standardised by
             real training cells and clipped to +-3; 0 is best
agreement    Cohen's kappa between the answers that a classifier (logistic regression on those features, trained on
             real stains of the training groups) gives on the real and on the predicted stain of the same cells; only
             where it reads the label from real held-out stains with a balanced accuracy of chance + 0.1 or more

train s, train cells/s   of the whole training, looks at held-out cells and checkpoints among it
predict cells/s          of the test cells, with every output that the method has: of translator two
memory MB                the greatest of the training: of the process, or of the GPU
parameters               of all networks, discriminators too; linear has none (its coefficients are solved for, not
                         trained), and apollo's free latents, some for every training cell, are not counted

translator has two outputs, the mean and the sharp one that its discriminator teaches, and a row for each.

Scores are means over markers, then over seeds or folds (least to greatest of these). Bold: the best mean, and every
method whose range over seeds or folds overlaps the range of the best. Folds of imc_spleen are regions, which differ, so
that ranges are wide there. Where the best agreement is below 0.1 none is bold, for that is chance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods_tables
import torch
from common import experiment_settings
from methods_work import Work, cores, run, timed
from study_bbbc013 import VAL
from study_imc_spleen import REGIONS

from imgshared.training.folder import processor

METHODS = ("linear", "regression", "pix2pix", "cut", "fastcut", "cyclegan", "mvae", "apollo", "translator")
PAPER_D = "method.discriminator_channels=[64,128,256,512]"
FLIPS = "augment.flips=true"  # for all that can use them: no method wins by augmentation alone


@dataclass(frozen=True)
class Edition:
    """How large everything is."""

    crop_px: int
    seconds: dict[str, float]  # of training, by dataset
    seeds: dict[str, int]  # by dataset; imc_spleen has its four folds instead
    cells_a_group: dict[str, int]  # at most so many cells a group are kept
    test_cells: dict[str, int]  # at most so many are scored
    train_cells: int  # at most so many real training cells for classifiers and the features' scale
    overrides: dict[str, tuple[str, ...]]


EDITIONS = {
    "cpu": Edition(
        crop_px=64,
        seconds={"simulated": 80, "bbbc013": 60, "imc_spleen": 45},
        seeds={"simulated": 3, "bbbc013": 2, "imc_spleen": 1},
        cells_a_group={"bbbc013": 64, "imc_spleen": 600},
        test_cells={"simulated": 1000, "bbbc013": 1000, "imc_spleen": 600},
        train_cells=1500,
        overrides={
            "regression": (FLIPS, "train.batch_size=16"),
            "pix2pix": (FLIPS,),
            "cut": (FLIPS, "method.width=16", "train.batch_size=4"),
            "fastcut": (FLIPS, "method.width=16", "train.batch_size=4"),
            "cyclegan": (FLIPS, "method.width=16", "train.batch_size=4"),
            "mvae": (FLIPS, "method.proteins_per_step=3", "train.batch_size=16"),
        },
    ),
    "full": Edition(
        crop_px=128,
        seconds={"simulated": 600, "bbbc013": 600, "imc_spleen": 600},
        seeds={"simulated": 5, "bbbc013": 5, "imc_spleen": 5},
        cells_a_group={},
        test_cells={"simulated": 1500, "bbbc013": 1500, "imc_spleen": 1500},
        train_cells=1500,
        overrides={
            "regression": (FLIPS, "method.channels=[64,128,256,512]"),
            "pix2pix": (FLIPS, "method.channels=[64,128,256,512,512,512]", PAPER_D, "train.batch_size=32"),
            "cut": (FLIPS, "method.width=64", "method.blocks=9", PAPER_D),
            "fastcut": (FLIPS, "method.width=64", "method.blocks=9", PAPER_D),
            "cyclegan": (FLIPS, "method.width=64", "method.blocks=6", PAPER_D),
            "mvae": (FLIPS, "method.channels=[64,128,256,256,96]", "method.latent_dim=512",
                     "method.proteins_per_step=3"),
            "apollo": ("method.channels=[64,128,256,256,96]", "method.shared_dim=1024", "method.specific_dim=200"),
            "translator": ("method.channels=[64,96,128,192,256]", "method.marker_dim=64", "train.batch_size=64",
                           "method.discriminator_channels=[64,128,256]", "method.translated=32"),
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """A dataset, how it is split, what is asked of it."""

    folds: dict[str, tuple[str, ...]]  # test and val groups by name; one fold: seeds instead
    labels: tuple[tuple[str, tuple[str, ...]], ...]
    shown: tuple[str, ...]  # markers of the picture
    overrides: tuple[str, ...] = ()
    quantiles: tuple[float, ...] = (0.5,)  # of linear's r, of the cells in the picture


def _split(test: Sequence[str], val: Sequence[str]) -> tuple[str, ...]:
    return f"split.test={json.dumps(list(test))}", f"split.val={json.dumps(list(val))}"


DATASETS = {
    "simulated": Dataset(
        folds={"": _split(["D08", "D09", "D10"], ["D06", "D07"])},
        labels=(("treatment", ("control", "treated")), ("cell_type", ("lymphocyte", "monocyte")),
                ("drug", ("vehicle", "drug"))),
        shown=("LaminB1", "FOXO3", "gH2AX", "Tubulin"),
    ),
    "bbbc013": Dataset(
        folds={"": _split([f"{row}{column:02d}" for row in "BF" for column in range(1, 13)], VAL)},
        labels=(("dose", ("low", "high")),),
        shown=("FKHR-EGFP",),
        quantiles=(0.1, 0.5, 0.9),
    ),
    "imc_spleen": Dataset(
        folds={r: _split([r], [REGIONS[(k + 1) % len(REGIONS)]]) for k, r in enumerate(REGIONS)},
        labels=(("region", ("white_pulp", "red_pulp")),),
        shown=("HistoneH3", "CD45", "CD20", "CD3"),
        overrides=("normalise.transform=arcsinh", "normalise.cofactor=1.0", "normalise.low=0.0"),
    ),
}  # fmt: skip


def main() -> None:
    """Do what is missing, then tell."""
    a = arguments()
    if a.tables:
        methods_tables.tell(a.tables, METHODS, readme=a.readme)
        return
    edition, out, data = EDITIONS[a.edition], a.out.resolve(), a.data.resolve()
    seconds = dict.fromkeys(DATASETS, a.seconds) if a.seconds else edition.seconds
    share = {"workers": a.workers, "threads": max(1, cores() // a.workers)}
    stores = [store(out, data, edition, name, a.cells) for name in a.datasets]
    folds = {name: turns(edition, name, a.repeats) for name in a.datasets}
    grounds = [ground(out, edition, name, fold) for name in a.datasets for fold in dict(folds[name])]
    speeds = [speed(out, edition, name, m, share) for name in a.datasets for m in a.methods]
    tasks = [
        task(out, edition, n, m, f, s, seconds[n], share) for n in a.datasets for f, s in folds[n] for m in a.methods
    ]
    for work in itertools.chain(stores, grounds, speeds, tasks):
        work.done()  # refuses other settings before anything begins
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that jobs are stopped, too
    with timed(out / "minutes.json"):
        for jobs in (stores, grounds, speeds, tasks):
            run(jobs, a.workers, share["threads"])
    said = {"edition": a.edition, "cells": a.cells, "repeats": a.repeats, **share}
    said["minutes"] = json.loads((out / "minutes.json").read_text())
    said["overrides"] = {m: edition.overrides.get(m, ()) for m in a.methods}
    tell(a, out, tasks, {name: {**said, "seconds": seconds[name]} for name in a.datasets})


def arguments() -> argparse.Namespace:
    """Read the command line, and refuse to record a part of the benchmark as the whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--edition", choices=EDITIONS, default="cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--workers", type=int, default=None, help="tasks at a time (default: 2; 1 on a GPU)")
    parser.add_argument("--seconds", type=float, default=None, help="of training, a task (default: the edition's)")
    parser.add_argument("--cells", type=int, default=2400, help="simulated")
    parser.add_argument("--repeats", type=int, default=None, help="at most so many seeds or folds a dataset")
    parser.add_argument("--record", type=Path, default=None, help="folder of the results (default: OUT/results)")
    parser.add_argument("--readme", action="store_true", help="also write README's tables, and the pictures to docs/")
    parser.add_argument("--tables", type=Path, default=None, help="only print the tables of this folder of results")
    a = parser.parse_args()
    if a.tables:
        return a
    if a.data is None or a.out is None:
        parser.error("DATA and OUT are needed")
    a.workers = a.workers or (1 if torch.cuda.is_available() else 2)
    part = ["--methods"] if set(a.methods) != set(METHODS) else []
    part += ["--repeats"] if a.repeats is not None else []
    if part and (a.record or a.readme):
        parser.error(f"--record and --readme are for the whole benchmark: leave out {' and '.join(part)}")
    if a.readme and a.edition != "cpu":
        parser.error(f"--readme: README's tables are of the edition cpu, not {a.edition}")
    return a


def tell(a: argparse.Namespace, out: Path, tasks: Sequence[Work], settings: dict[str, dict[str, Any]]) -> None:
    """Write and print the results, of a failed benchmark to OUT alone."""
    failed = [w.name for w in tasks if not w.result.exists()]
    results = a.record if a.record and not failed else out / "results"
    for name in a.datasets:
        mine = [w.result for w in tasks if w.job["name"]["dataset"] == name]
        methods_tables.write(results, name, mine, settings[name])
        methods_tables.picture(out, name, mine, DATASETS[name].shown, DATASETS[name].quantiles)
    readme = a.readme and not failed
    methods_tables.tell(results, METHODS, readme=readme, pictures=out, datasets=a.datasets)
    if failed:
        sys.exit(f"{len(failed)} of {len(tasks)} tasks failed, so the results are in {results} alone: "
                 f"{', '.join(failed)}")  # fmt: skip


def turns(edition: Edition, dataset: str, most: int | None) -> list[tuple[str, int]]:
    """Return the (fold, seed) pairs of a dataset."""
    pairs = [(fold, seed) for seed in range(edition.seeds[dataset]) for fold in DATASETS[dataset].folds]
    return pairs[:most]


def store(out: Path, data: Path, edition: Edition, dataset: str, cells: int) -> Work:
    """Prepare a dataset's cells."""
    job = {"data": str(data), "dataset": dataset, "cells": cells, "crop_px": edition.crop_px}
    job["cells_a_group"] = edition.cells_a_group.get(dataset)
    return Work(_store(out, dataset), {"kind": "store", "name": {"dataset": dataset}, **job})


def ground(out: Path, edition: Edition, dataset: str, fold: str) -> Work:
    """Compute what all methods share in a fold."""
    d = DATASETS[dataset]
    job = {"labels": d.labels, "quantiles": d.quantiles, "test_cells": edition.test_cells[dataset]}
    job |= {"train_cells": edition.train_cells, **_experiment(out, edition, dataset, "linear", fold, 0)}
    name = {"dataset": dataset, "fold": fold}
    return Work(_ground(out, dataset, fold), {"kind": "ground", "name": name, **job}, [_store(out, dataset)])


def speed(out: Path, edition: Edition, dataset: str, method: str, share: dict[str, int]) -> Work:
    """Measure how fast a method trains, here and with this share of the cores."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    job = {**share, "device": device}
    job |= _experiment(out, edition, dataset, method, next(iter(DATASETS[dataset].folds)), 0)
    name = {"dataset": dataset, "method": method}
    return Work(_speed(out, dataset, method), {"kind": "speed", "name": name, **job}, [_store(out, dataset)])


def task(
    out: Path, edition: Edition, dataset: str, method: str, fold: str, seed: int, seconds: float, share: dict[str, int]
) -> Work:
    """Train and score a method."""
    several = len(DATASETS[dataset].folds) > 1
    turn = f"{fold}_{seed}" if several and edition.seeds[dataset] > 1 else fold or str(seed)
    d = DATASETS[dataset]
    needs = [_ground(out, dataset, fold), _speed(out, dataset, method)]
    job = {"seconds": seconds, "labels": d.labels, "shown": d.shown, "ground": str(needs[0]), "speed": str(needs[1])}
    job |= {**share, **_experiment(out, edition, dataset, method, fold, seed)}
    name = {"dataset": dataset, "method": method, "turn": turn}
    return Work(out / dataset / f"{method}_{turn}" / "result.json", {"kind": "task", "name": name, **job}, needs)


def _store(out: Path, dataset: str) -> Path:
    return out / "stores" / dataset / "cells.zarr"


def _ground(out: Path, dataset: str, fold: str) -> Path:
    return out / dataset / f"ground{fold and '_' + fold}.npz"


def _speed(out: Path, dataset: str, method: str) -> Path:
    return out / dataset / f"speed_{method}.json"


def _experiment(out: Path, edition: Edition, dataset: str, method: str, fold: str, seed: int) -> dict[str, Any]:
    d = DATASETS[dataset]
    overrides = [f"data={_store(out, dataset)}", f"seed={seed}", *d.folds[fold], *d.overrides]
    overrides += edition.overrides.get(method, ())
    return experiment_settings(method, overrides)


if __name__ == "__main__":
    main()
