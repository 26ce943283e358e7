"""How fast apollo trains at its published sizes, and what data loading costs.

    python scripts/benchmark_training.py [--steps 5] [--record benchmarks/training.json]

One run measures, in turn and repeatedly, plain float32 in the default memory format against what `train` uses
(channels_last, and bf16 where the hardware has it): 128-pixel crops, stage 1 of `configs/apollo_published.yaml`, four
decoders, batch 64, one protein a cell. Then it trains from a store of random crops and measures how long a step waits
for its batch, with the crops in memory and streamed from disk; and how the time of the free latents' step depends on
the number of cells. Figures are medians; read the ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import ROOT, markdown, record

from imgshared.config import Experiment, load
from imgshared.data.feed import Feed, Residency
from imgshared.data.normalise import Normaliser
from imgshared.data.panel import Panel
from imgshared.data.store import CellStore, StoreWriter, panel_table
from imgshared.methods.apollo import Apollo
from imgshared.models.latents import LatentTable
from imgshared.training.devices import has_bf16
from imgshared.types import Batch

CROP, BATCH = 128, 64


class Bench:
    """A method, its optimiser and a batch, in one precision and memory format."""

    def __init__(self, device: torch.device, *, channels_last: bool, bf16: bool) -> None:
        config = load(Experiment, ROOT / "configs" / "apollo_published.yaml").method
        torch.manual_seed(0)
        self.device, self.bf16 = device, bf16
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.method = Apollo(config, markers=2, chromatin=0, crop_px=CROP).to(device, memory_format=self.format)
        self.method.prepare(torch.ones(1024, 2, dtype=torch.bool), seed=0)
        self.stage = self.method.stages[0]
        self.method.start(self.stage)
        group = self.stage.groups["generator"][0]
        self.optimizer = torch.optim.Adam(group.parameters, lr=group.lr)
        images = torch.rand(BATCH, 2, CROP, CROP, device=device).contiguous(memory_format=self.format)
        self.batch = Batch(
            torch.arange(BATCH, device=device), images, torch.ones(BATCH, 2, dtype=torch.bool, device=device)
        )

    def step(self, batch: Batch | None = None) -> float:
        """Take a training step and return its seconds."""
        began = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            terms = self.method.loss(batch or self.batch, "generator")
        self.optimizer.zero_grad(set_to_none=True)
        terms.total.backward()
        self.optimizer.step()
        for table, lr in self.stage.tables:
            table.step(lr)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--record", type=Path, default=None, help="JSON to write")
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, used = compare(device, a.steps)
    print(markdown(rows))
    loading = measure_loading(used, device, a.steps)
    print("\n" + markdown(loading))
    latents = measure_latents(device)
    print("\n" + markdown(latents))
    if a.record:
        record(
            a.record,
            {
                "speed": rows,
                "loading": loading,
                "latents": latents,
                "crop_px": CROP,
                "batch": BATCH,
                "device": str(device),
            },
        )


def compare(device: torch.device, steps: int) -> tuple[list[dict[str, object]], Bench]:
    """Time the variants in turn, so that a drift of the machine's speed meets all of them."""
    variants = {
        "float32, contiguous": Bench(device, channels_last=False, bf16=False),
        "float32, channels_last": Bench(device, channels_last=True, bf16=False),
    }
    if has_bf16(device.type):
        variants["bf16, channels_last"] = Bench(device, channels_last=True, bf16=True)
    for bench in variants.values():
        bench.step()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(steps):
        for name, bench in variants.items():
            seconds[name].append(bench.step())
    plain = float(np.median(seconds["float32, contiguous"]))
    rows = [
        {"variant": name, "cells/s": BATCH / float(np.median(s)), "ratio": plain / float(np.median(s))}
        for name, s in seconds.items()
    ]
    return rows, list(variants.values())[-1]


def measure_loading(bench: Bench, device: torch.device, steps: int) -> list[dict[str, object]]:
    """Return the share of a step that waits for its batch."""
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "cells.zarr", 16 * BATCH)
        normaliser = Normaliser("linear", 5.0, (0.0, 0.0), (4000.0, 4000.0))
        residencies: list[Residency] = ["memory", "stream"] + (["device"] if device.type == "cuda" else [])
        return [
            {
                "crops": r,
                **_share(bench, Feed(store, np.arange(len(store)), [0, 1], normaliser, device, r, BATCH), steps),
            }
            for r in residencies
        ]


def _share(bench: Bench, feed: Feed, steps: int) -> dict[str, object]:
    waits, works = [], []
    batches = feed.epoch(0)
    for _ in range(min(steps + 1, feed.steps)):
        began = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        works.append(bench.step(batch))
    batches.close()  # type: ignore[attr-defined]
    wait, work = float(np.median(waits[1:])), float(np.median(works[1:]))
    return {"wait (ms)": 1000 * wait, "step (ms)": 1000 * work, "share (%)": 100 * wait / (wait + work)}


def measure_latents(device: torch.device, dim: int = 128, steps: int = 50) -> list[dict[str, object]]:
    """Return the time of drawing and updating a batch of rows, by the number of cells."""
    out = []
    for cells in (10_000, 100_000, 1_000_000):
        table = LatentTable(cells, dim, std=0.1, seed=0)
        seconds = []
        for _ in range(steps):
            rows = torch.randperm(cells)[:BATCH].to(device)
            began = time.perf_counter()
            table.draw(rows).square().sum().backward()
            table.step(0.1)
            seconds.append(time.perf_counter() - began)
        out.append({"cells": f"{cells:,}", "latent step (ms)": 1000 * float(np.median(seconds))})
    return out


def random_store(path: Path, cells: int) -> CellStore:
    """Write a store of noise; what compresses least loads slowest."""
    rng = np.random.default_rng(0)
    panel = Panel(("DNA", "P"), "DNA")
    writer = StoreWriter(path)
    for _ in range(cells // BATCH):
        crops = rng.integers(0, 4000, (BATCH, 2, CROP, CROP), dtype=np.uint16)
        writer.append(single_cell_images=crops, cell_masks=np.ones((BATCH, CROP, CROP), np.uint8))
    obs = pd.DataFrame({"group": pd.Categorical(["g"] * cells)}, index=[str(i) for i in range(cells)])
    writer.finish(
        obs,
        panel_table(panel),
        np.zeros((cells, 2)),
        layers={"measured": np.ones((cells, 2), bool)},
        obsm={"spatial": np.zeros((cells, 2))},
        info={"kind": "cells", "crop_px": CROP, "pixel_size_um": None},
    )
    return CellStore(path)


if __name__ == "__main__":
    main()
