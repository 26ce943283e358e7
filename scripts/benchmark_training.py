"""How fast methods train, what of the device's rate of multiplying they reach, and what data loading costs.

    python scripts/benchmark_training.py [--steps 5] [--parts speed methods terms compiled]
                                          [--record benchmarks]

One run measures, in turn and repeatedly, plain float32 in the default memory format against what `train` uses
(channels_last, and bf16 where the hardware has it): 128-pixel crops, stage 1 of `configs/apollo_published.yaml`, four
decoders, batch 64, one protein a cell. Beside them, in the same rounds, `configs/translator.yaml` but for its batch,
which is 8 and here 64: with method.translated=4 as there, so that 4 of the 64 cells meet the discriminator (4 of 8 in
the file), in float32, with each of its costlier terms, with all cells translated, and predicting. Then it trains from a
store of random crops and measures how long a step waits for its batch, with the crops in memory and streamed from disk.
Last, every method by its own configuration, 64-pixel crops, each in a process of its own: cells/s, floating-point
operations a second beside the rate of a large matrix product in the same precision, the share of a step that waits for
crops streamed from disk, and the greatest memory. How a step depends on the number of cells is benchmark_scale.py's
question. `terms` asks what translator's costlier terms make of a step in which every cell is translated, `compiled`
what torch.compile gains, with CUDA graphs on a GPU; both are left out unless named. Figures are medians; read the
ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import MEAN, ROOT, markdown, record
from torch.utils.flop_counter import FlopCounterMode

from imgshared.build import build_method
from imgshared.config import Experiment, load
from imgshared.data.feed import Feed, Residency
from imgshared.data.normalise import Normaliser
from imgshared.data.panel import Panel
from imgshared.data.store import CellStore, StoreWriter, panel_table
from imgshared.methods.base import Method
from imgshared.training.devices import has_bf16
from imgshared.types import Batch

CROP, BATCH = 128, 64
METHODS = ("apollo", "translator", "regression", "pix2pix", "cut", "fastcut", "cyclegan", "mvae", "linear")
SMALL = 64  # px, of the crops on which every method is timed
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is the device's rate
NORMALISER = Normaliser("linear", 5.0, (0.0, 0.0), (4000.0, 4000.0))
PLAIN = "apollo, float32, contiguous"
TRANSLATOR, PREDICTS = "translator", "translator predicts one stain"
PARTS = ("speed", "methods", "terms", "compiled")
TERMS = ("patch_nce", "cycle", "agreement", "independence", "identity")
ALL = "method.translated=null"


class Bench:
    """A method, its optimisers and a batch of crops, in one precision and memory format, for so many training cells."""

    def __init__(
        self,
        device: torch.device,
        config: str,
        *overrides: str,
        channels_last: bool,
        bf16: bool,
        crop: int = CROP,
        cells: int = 1024,
        compiled: bool = False,
    ) -> None:
        settings = load(Experiment, ROOT / "configs" / f"{config}.yaml", overrides).method
        torch.manual_seed(0)
        self.device, self.bf16 = device, bf16
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        method = build_method(settings, Panel(("DNA", "P"), "DNA"), crop)
        method.prepare(torch.ones(cells, 2, dtype=torch.bool), seed=0)
        self.method: Method = method.to(device).to(memory_format=self.format)
        if compiled:
            for network in self.method.children():
                network.compile(mode="reduce-overhead" if device.type == "cuda" else None)  # with CUDA graphs
        self.stage = self.method.stages[0]
        self.method.start(self.stage)
        self.optimizers = {
            player: torch.optim.Adam([{"params": list(g.parameters), "lr": g.lr} for g in groups]) if groups else None
            for player, groups in self.stage.groups.items()
        }
        images = torch.rand(BATCH, 2, crop, crop, device=device).contiguous(memory_format=self.format)
        self.batch = Batch(
            torch.arange(BATCH, device=device), images, torch.ones(BATCH, 2, dtype=torch.bool, device=device)
        )

    def step(self, batch: Batch | None = None) -> float:
        """Take a training step and return its seconds."""
        began = time.perf_counter()
        for player, optimizer in self.optimizers.items():
            self.method.turn(player)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                terms = self.method.loss(batch or self.batch, player)
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
                terms.total.backward()
                optimizer.step()
        for table, lr in self.stage.tables:
            table.step(lr)
        return self._since(began)

    @torch.inference_mode()
    def predict(self) -> float:
        """Predict the protein from chromatin and return the seconds."""
        self.method.eval()
        given = torch.zeros_like(self.batch.measured)
        given[:, 0] = True
        began = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            self.method.translate(self.batch.images, given, [1])
        seconds = self._since(began)
        self.method.start(self.stage)
        return seconds

    def _since(self, began: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:2])
    parser.add_argument(
        "--record",
        type=Path,
        default=None,
        help="folder for training.json, training_methods.json, ...; on a GPU training_cuda.json, ...",
    )
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for part in a.parts:
        found: dict[str, Any] = {}
        if part == "speed":
            found["speed"], used = compare(device, a.steps)
            found["loading"] = measure_loading(used, device, a.steps)
        elif part == "methods":
            found["methods"] = [apart(every_step, method, str(device), a.steps) for method in METHODS]
        elif part == "terms":
            found["terms"] = compare_terms(device, a.steps)
        else:
            found["compiled"] = compare_compiled(device, a.steps)
        print("\n\n".join(markdown(rows) for rows in found.values()), "\n")
        if a.record:
            crop = SMALL if part == "methods" else CROP
            record(
                a.record / file_name(part, device), {**found, "crop_px": crop, "batch": BATCH, "device": str(device)}
            )


def file_name(part: str, device: torch.device) -> str:
    """Return the name of a part's results; those of a GPU stand beside the CPU's, not over them."""
    words = ["training", *([part] if part != "speed" else []), *([device.type] if device.type != "cpu" else [])]
    return "_".join(words) + ".json"


def compare(device: torch.device, steps: int) -> tuple[list[dict[str, object]], Bench]:
    """Time the variants in turn, so that a drift of the machine's speed meets all of them."""
    half = has_bf16(device.type)
    best = partial(Bench, device, channels_last=True, bf16=half)
    named = "bf16, channels_last" if half else "float32, channels_last"
    variants = {
        PLAIN: Bench(device, "apollo_published", channels_last=False, bf16=False),
        "apollo, float32, channels_last": Bench(device, "apollo_published", channels_last=True, bf16=False),
        f"apollo, {named}": best("apollo_published"),
        "translator, float32, contiguous": Bench(device, "translator", channels_last=False, bf16=False),
        TRANSLATOR: best("translator"),
    }
    for term in TERMS:
        variants[f"{TRANSLATOR} + {term}"] = best("translator", f"method.weights.{term}=0.1")
    variants["translator, all cells translated"] = best("translator", ALL)
    variants["translator without adversarial"] = best("translator", *MEAN)
    work = {name: bench.step for name, bench in variants.items()} | {PREDICTS: variants[TRANSLATOR].predict}
    median = medians(work, steps)
    rows = [
        {"variant": name, "cells/s": BATCH / s, "ratio to plain apollo": median[PLAIN] / s,
         "time / translator's step": s / median[TRANSLATOR]}
        for name, s in median.items()
    ]  # fmt: skip
    return rows, variants[f"apollo, {named}"]


def medians(work: Mapping[str, Callable[[], float]], steps: int) -> dict[str, float]:
    """Do each job once to warm up and then so many times, in turn; the median of its seconds."""
    for job in work.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(steps):
        for name, job in work.items():
            seconds[name].append(job())
    return {name: float(np.median(s)) for name, s in seconds.items()}


def compare_terms(device: torch.device, steps: int) -> list[dict[str, object]]:
    """Time translator's step with every cell translated, and with each of its costlier terms."""
    best = partial(Bench, device, "translator", ALL, channels_last=True, bf16=has_bf16(device.type))
    work = {TRANSLATOR: best().step, **{term: best(f"method.weights.{term}=0.1").step for term in TERMS}}
    found = medians(work, steps)
    return [
        {"with": name, "cells/s": BATCH / s, "time / translator's step": s / found[TRANSLATOR]}
        for name, s in found.items()
    ]


def compare_compiled(device: torch.device, steps: int) -> list[dict[str, Any]]:
    """Time steps with networks as they are and compiled, in turn."""
    rows = []
    for name in ("apollo_published", "translator"):
        pair = [
            Bench(device, name, channels_last=True, bf16=has_bf16(device.type), compiled=compiled)
            for compiled in (False, True)
        ]
        pair[0].step()
        first = sum(pair[1].step() for _ in range(3))  # later batches may ask for other sizes
        seconds = np.array([[bench.step() for bench in pair] for _ in range(steps)])
        plain, compiled = np.median(seconds, 0)
        rows.append({"config": name, "plain (s)": float(plain), "compiled (s)": float(compiled),
                     "ratio": float(plain / compiled), "first three steps (s)": first})  # fmt: skip
    return rows


def measure_loading(bench: Bench, device: torch.device, steps: int) -> list[dict[str, object]]:
    """Return the share of a step that waits for its batch."""
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "cells.zarr", 16 * BATCH)
        residencies: list[Residency] = ["memory", "stream"]
        if device.type == "cuda":
            residencies.append("device")
        return [
            {
                "crops": r,
                **_share(bench, Feed(store, np.arange(len(store)), [0, 1], NORMALISER, device, r, BATCH), steps),
            }
            for r in residencies
        ]


def _share(bench: Bench, feed: Feed, steps: int) -> dict[str, Any]:
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


def apart(job: Callable[..., dict[str, Any]], *words: Any) -> dict[str, Any]:
    """Run a job in a process of its own, whose memory is its alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *words).result()


def every_step(name: str, device_name: str, steps: int) -> dict[str, Any]:
    """Time a method's steps on crops that are streamed from disk."""
    device = torch.device(device_name)
    half = has_bf16(device.type)
    bench = Bench(device, name, channels_last=True, bf16=half, crop=SMALL)
    bench.step()  # warm up
    with FlopCounterMode(display=False) as counter:
        bench.step()
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "cells.zarr", 16 * BATCH, SMALL)
        feed = Feed(store, np.arange(len(store)), [0, 1], NORMALISER, device, "stream", BATCH)
        share = _share(bench, feed, steps)
    seconds = (share["step (ms)"] + share["wait (ms)"]) / 1000
    rate, peak = counter.get_total_flops() / seconds / 1e9, matmul_rate(device, half) / 1e9
    return {
        "method": name, "cells/s": BATCH / seconds, "GFLOP/s": rate, "of the matmul rate (%)": 100 * rate / peak,
        "waits for crops (%)": share["share (%)"], "greatest memory (GB)": greatest_memory(device),
    }  # fmt: skip


def matmul_rate(device: torch.device, half: bool) -> float:
    """Floating-point operations a second of a large matrix product; the best of ten."""
    side = SIDE[device.type]
    a = torch.rand(side, side, device=device, dtype=torch.bfloat16 if half else torch.float32)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def greatest_memory(device: torch.device) -> float:
    """GB that this process has held at most: on the GPU, or resident in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM"))


def random_store(path: Path, cells: int, crop: int = CROP) -> CellStore:
    """Write a store of noise; what compresses least loads slowest."""
    rng = np.random.default_rng(0)
    panel = Panel(("DNA", "P"), "DNA")
    writer = StoreWriter(path)
    for _ in range(cells // BATCH):
        crops = rng.integers(0, 4000, (BATCH, 2, crop, crop), dtype=np.uint16)
        writer.append(single_cell_images=crops, cell_masks=np.ones((BATCH, crop, crop), np.uint8))
    obs = pd.DataFrame({"group": pd.Categorical(["g"] * cells)}, index=[str(i) for i in range(cells)])
    writer.finish(
        obs,
        panel_table(panel),
        np.zeros((cells, 2)),
        layers={"measured": np.ones((cells, 2), bool)},
        obsm={"spatial": np.zeros((cells, 2))},
        info={"kind": "cells", "crop_px": crop, "pixel_size_um": None},
    )
    return CellStore(path)


if __name__ == "__main__":
    main()
