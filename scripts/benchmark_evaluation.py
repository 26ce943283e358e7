"""How long the classifiers of a large study take: 36 resamples x 6 stains x 5 inputs on 4,000 cells of 64 x 64 px.

    python scripts/benchmark_evaluation.py [--record benchmarks/evaluation.json]

Linear classifiers run in full: the features of every input once, then 1,080 fits, each learning from three quarters of
the groups. Networks (`cnn`, 600 batches each) are timed for a few steps, one by one and together, on the same cells;
the length of the study follows. Cells are synthetic; only the time is of interest.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import ROOT, markdown, record
from numpy.typing import NDArray

from imgshared.config import EvaluateConfig
from imgshared.data.features import central_frame, stain_features
from imgshared.evaluation import cnn
from imgshared.evaluation.jobs import Job, View
from imgshared.evaluation.solve import solve

CELLS, GROUPS, PX = 4000, 20, 64
RESAMPLES, STAINS, INPUTS = 36, 6, 5
RADIUS = 20.0  # of the frame of the features, px


def main() -> None:
    """Time both backends and record what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "evaluation.json", help="JSON to write")
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    truth, groups = rng.integers(0, 2, CELLS), rng.integers(0, GROUPS, CELLS)
    inputs = [crops(rng, truth) for _ in range(STAINS * INPUTS)]
    jobs = STAINS * INPUTS * RESAMPLES
    config = EvaluateConfig(labels=("class",))

    began = time.perf_counter()
    where = central_frame(CELLS, PX, RADIUS)
    features = [stain_features(images, where) for images in inputs]
    extracted = time.perf_counter() - began
    solve(asked("features", features, truth, groups), config, None, lambda what, done, total: None)
    linear = time.perf_counter() - began

    training = cnn.Training(config.cnn, config.cnn_steps, config.seed)
    few = asked("cnn", inputs, truth, groups)[:: RESAMPLES * 2]
    paces = cnn.paces(cnn.build(training, 1, 2), few, training, steps=6)
    rows = [{"form": "one by one" if n == 1 else f"{n} together", "cells a second": p,
             "hours": jobs * config.cnn_steps * cnn.BATCH / p / 3600} for n, p in paces.items()]  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "device": device, "threads": torch.get_num_threads(), "jobs": jobs,
        "features": {"extracting_s": extracted, "in all_s": linear}, "networks": rows,
    }  # fmt: skip
    record(a.record, result)
    print(f"{jobs:,} classifiers on {device}, {torch.get_num_threads()} threads")
    print(f"by features: {linear:.0f} s, of which extracting {extracted:.0f} s\n")
    print(markdown(pd.DataFrame(rows).round(1).to_dict("records")))


def crops(rng: np.random.Generator, truth: NDArray[np.intp]) -> NDArray[np.float32]:
    """Discs in noise, a little brighter in the second class."""
    y, x = np.mgrid[:PX, :PX] - PX / 2
    disc = np.hypot(y, x) < rng.uniform(10, 20, (CELLS, 1, 1))
    bright = 0.4 + 0.1 * truth + 0.1 * rng.normal(size=CELLS)
    images = disc * bright[:, None, None] + 0.1 * rng.random((CELLS, PX, PX))
    return np.asarray(images, np.float32)


def asked(backend: str, inputs: list[Any], truth: NDArray[np.intp], groups: NDArray[np.intp]) -> list[Job]:
    """Return a job for each input and resample of groups."""
    jobs = []
    for values in inputs:
        array = values.astype(np.float16) if backend == "cnn" else values
        for resample in range(RESAMPLES):
            held = np.random.default_rng(resample).permutation(GROUPS)[: GROUPS // 4]
            test = np.isin(groups, held)
            learn, rest = np.flatnonzero(~test), np.flatnonzero(test)
            views = (View((array,), (rows,)) for rows in (learn, rest))
            jobs.append(Job(backend, next(views), truth[learn], groups[learn], (next(views),), 2))
    return jobs


if __name__ == "__main__":
    main()
