"""kill -9 at random moments: what is gone on with is what an uninterrupted run gives, byte by byte.

    python scripts/study_kill.py OUT [--kills 20] [--commands prepare train predict] [--record benchmarks/kill.json]

`prepare`, `train` and `predict` (of a slide) are each started as a process, killed after a random part of the time that
they take undisturbed, and started again by the same command (train with --resume), 20 times each; a job that ends
before its turn is compared and begun anew. Every job that ends is held against the undisturbed one. Of commands that
are not asked for, what is recorded stays as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from common import MEAN, ROOT, markdown, provenance, record

from imgshared.config import load
from imgshared.config.schema import SimulateConfig
from imgshared.data.ngff import open_ngff
from imgshared.data.store import CellStore
from imgshared.training import checkpoint

COMMANDS = ("prepare", "train", "predict")


@dataclass(frozen=True)
class Verb:
    """A command, how it is gone on with, and what is compared of what it writes."""

    name: str
    words: Callable[[Path, bool], list[Any]]
    digest: Callable[[Path], str]


def main() -> None:
    """Kill each verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "kill.json", help="JSON to write")
    a = parser.parse_args()
    shutil.rmtree(a.out, ignore_errors=True)
    a.out.mkdir(parents=True)
    recorded = json.loads(a.record.read_text())["commands"] if a.record.exists() else []
    rows = {row["command"]: row for row in recorded}
    for verb in verbs(a.out):
        found = one(verb, a.out, a.kills if verb.name in a.commands else 0, random.Random(0))
        if verb.name in a.commands:
            rows[verb.name] = {**found, "commit": provenance()["commit"]}
    record(a.record, {"commands": list(rows.values())})
    print(markdown(rows.values()))


def verbs(out: Path) -> list[Verb]:
    """Return the three commands; the undisturbed result of each is what the next one starts from."""
    images, slide = out / "images", out / "slide.ome.tif"
    import imgshared

    imgshared.simulate(images, config=load(SimulateConfig, None, ["cells=400", "donors=5"]))
    noise = np.random.default_rng(0).poisson(300, (1, 3000, 4000)).astype(np.uint16)
    metadata = {"axes": "CYX", "Channel": {"Name": ["DNA"]}, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(slide, noise, tile=(256, 256), metadata=metadata, ome=True)
    store, run = out / "prepare" / "straight", out / "train" / "straight"
    settings = [f"data={store}", "method.epochs=3", "train.checkpoint_minutes=0", *MEAN]
    return [
        Verb("prepare", lambda to, again: ["prepare", images / "manifest.csv", to], of_store),
        Verb(
            "train",
            lambda to, again: ["train", ROOT / "configs" / "translator.yaml", *settings, "--out", to,
                               *(["--resume"] if again else [])],
            of_run,
        ),
        Verb("predict", lambda to, again: ["predict", run, slide, "--out", to, "tile=256"], of_image),
    ]  # fmt: skip


def one(verb: Verb, out: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Run a command undisturbed, then kill it so many times; count what came out different."""
    folder = out / verb.name
    folder.mkdir()
    straight, began = folder / "straight", time.perf_counter()
    start(verb, straight).wait()
    seconds = time.perf_counter() - began
    want, killed, ended, different, job, ended_last = verb.digest(straight), 0, 0, 0, 0, not kills
    while killed < kills or not ended_last:
        to = folder / f"killed{job}"
        process, ended_last = start(verb, to), False
        try:
            process.wait(rng.uniform(0, seconds) if killed < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            if not is_whole(to):
                continue
        assert is_whole(to) or process.returncode == 0, f"{verb.name} could not go on: {process.returncode}"
        ended_last = killed == kills
        ended, different, job = ended + 1, different + (verb.digest(to) != want), job + 1
    print(f"{verb.name}: {killed} kills, {ended} jobs, {different} different", flush=True)
    return {"command": verb.name, "seconds undisturbed": seconds, "kills": killed, "jobs that ended": ended,
            "different": different}  # fmt: skip


def is_whole(to: Path) -> bool:
    """Whether a store or image has its name already: it was killed when all was done."""
    return to.exists() and not (to / "checkpoints").exists()


def start(verb: Verb, to: Path) -> subprocess.Popen[bytes]:
    """Start a command, to go on where there is something to go on with."""
    words = verb.words(to, (to / "checkpoints").exists() or (to / "config.yaml").exists())
    command = [sys.executable, "-m", "imgshared.cli", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def of_store(path: Path) -> str:
    """Digest of a store's crops and tables."""
    store = CellStore(path)
    return hashlib.sha256((store.data_hash + store.obs.to_csv()).encode()).hexdigest()


def of_run(path: Path) -> str:
    """Digest of the last weights."""
    tree, _ = checkpoint.load(path / "checkpoints" / "last.safetensors")
    parts = [name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(tree["model"].items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def of_image(path: Path) -> str:
    """Digest of an image's finest level and names."""
    image = open_ngff(path)
    return hashlib.sha256(image.read(range(image.shape[0])).tobytes() + str(image.channels).encode()).hexdigest()


if __name__ == "__main__":
    main()
