"""Whether a training step costs more with more cells: apollo's free latents at its published sizes, crops from disk.

    python scripts/benchmark_scale.py [--cells 1000 100000 1000000] [--steps 12] [--record benchmarks/scale.json]

For each number of cells, in a process of its own, `configs/apollo_published.yaml` takes steps of stage 1 on crops that
are streamed from a store of that many: 128 px, two stains, uint16. The files of the store are links to those of 1,024
cells of noise, so that a million fit on a disk; a step opens and decodes as many of them as it would of others. Told
are the step, how long it waited for its batch, what the latents and their moments take, and what else is resident. A
million cells need 17 GB for their latents.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import zarr
from benchmark_training import BATCH, NORMALISER, Bench, apart, greatest_memory, random_store
from common import ROOT, markdown, record

from imgshared.data.feed import Feed
from imgshared.data.store import IMAGES, MASKS, CellStore
from imgshared.training.devices import has_bf16

DISTINCT = 1024  # cells that are written


def main() -> None:
    """Time each number of cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2, help="of all numbers, for the machine's speed drifts")
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "scale.json", help="JSON to write")
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = [apart(steps_of, cells, device, a.steps) for _ in range(a.rounds) for cells in a.cells]
    table = pd.DataFrame(found)
    rows = table.groupby("cells").median().reset_index()
    rows["step / the first's"] = rows["step (ms)"] / rows["step (ms)"].iloc[0]
    rows["cells"] = rows["cells"].astype(int)
    record(a.record, {"device": device, "steps": rows.to_dict("records"), "rounds": found})
    print(markdown(rows.to_dict("records")))


def steps_of(cells: int, device_name: str, steps: int) -> dict[str, Any]:
    """Take steps on so many cells."""
    device = torch.device(device_name)
    with tempfile.TemporaryDirectory() as folder:
        store = linked_store(Path(folder), cells)
        bench = Bench(device, "apollo_published", channels_last=True, bf16=has_bf16(device.type), cells=cells)
        feed = Feed(store, np.arange(cells), [0, 1], NORMALISER, device, "stream", BATCH)
        began, waits, works = time.perf_counter(), [], []
        batches = feed.epoch(0)
        for _ in range(steps + 2):
            waits.append(-time.perf_counter())
            batch = next(batches)
            waits[-1] += time.perf_counter()
            works.append(bench.step(batch))
        batches.close()  # type: ignore[attr-defined]
    tables = sum(t.nbytes for table in bench.method.tables.values() for t in table.state().values()) / 1e9
    wait, work = (float(np.median(seconds[2:])) for seconds in (waits, works))
    return {
        "cells": cells, "step (ms)": 1000 * (wait + work), "waits (%)": 100 * wait / (wait + work),
        "first batch (s)": waits[0], "steps in all (s)": time.perf_counter() - began, "latents (GB)": tables,
        "greatest memory beside them (GB)": greatest_memory(device) - (tables if device.type == "cpu" else 0),
    }  # fmt: skip


def linked_store(folder: Path, cells: int) -> CellStore:
    """A store of so many cells whose crops are those of the first ones, over and over."""
    path = folder / "cells.zarr"
    random_store(path, DISTINCT)
    root = zarr.open_group(path, mode="r+")
    for name in (IMAGES, MASKS):
        array: Any = root[f"obsm/{name}"]
        shard, there = array.shards[0], array.shape[0] // array.shards[0]
        array.resize((cells, *array.shape[1:]))
        tail = Path(*["0"] * (array.ndim - 1))
        for k in range(there, -(-cells // shard)):
            to = path / "obsm" / name / "c" / str(k) / tail
            to.parent.mkdir(parents=True, exist_ok=True)
            os.link(path / "obsm" / name / "c" / str(k % there) / tail, to)
    store = CellStore(path)
    store.obs = pd.DataFrame({"group": pd.Categorical(np.repeat("g", cells))}, index=pd.RangeIndex(cells))
    store.measured = np.ones((cells, 2), bool)
    return store


if __name__ == "__main__":
    main()
