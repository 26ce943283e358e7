"""What the studies share: what is finished already, where results go, hardware and commit, Markdown tables."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from imgshared.training.devices import has_bf16
from imgshared.training.folder import changes, processor
from imgshared.training.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
# translator's mean alone, without the sharp output: the held-out error then chooses the checkpoint.
MEAN = ("method.weights.adversarial=0", "method.weights.sharp=0")
FLAGS = ("avx512_bf16", "amx_bf16")  # of a processor, which decide how fast it trains and in which precision


def experiment_settings(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return what an experiment depends on: its YAML, by name and content, and what overrides it."""
    content = (ROOT / "configs" / f"{config}.yaml").read_bytes()
    changed = dict(o.partition("=")[::2] for o in overrides)
    return {"config": config, "config_sha256": hashlib.sha256(content).hexdigest()[:16], "overrides": changed}


def finished(made: Path, said: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `made` is there and of these settings, which `said` holds, so that it need not be made again.

    What is of other settings, or of unknown ones, ends the script: it is neither taken for this nor overwritten.
    """
    if said.exists():
        changed = changes(json.loads(said.read_text() or "{}"), json.loads(json.dumps(settings)))
        if changed:
            sys.exit(
                f"{said} says other settings: {'; '.join(changed)}. Choose another folder, or delete what is there"
            )
    elif made.exists():
        sys.exit(f"nothing says what {made} was made with ({said} is missing): choose another folder, or delete it")
    return made.exists()


def code() -> dict[str, Any]:
    """Return the commit, and whether what runs differs from it."""
    head = _git("rev-parse", "--short", "HEAD")
    return {"commit": head or None, "dirty": bool(_git("status", "--porcelain", "imgshared", "configs", "scripts"))}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


CODE = code()  # as it was loaded, whatever is committed while it runs


def provenance() -> dict[str, Any]:
    """Return hardware, the precision that `train` chooses on it, versions and commit."""
    gpu = torch.cuda.is_available()
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.exists() else None
    return {
        "processor": processor(),
        **{name: None if flags is None else name in flags for name in FLAGS},
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "precision": "bf16" if has_bf16("cuda" if gpu else "cpu") else "float32",
        "python": platform.python_version(),
        "torch": version("torch"),
        "imgshared": version("imgshared"),
        **CODE,
    }


def record(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON with its provenance; beside first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_plain({"provenance": provenance(), **result}), indent=1, allow_nan=False) + "\n")
    partial.replace(path)
    print(f"\nwritten: {path}")


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null in their place."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fold_off(ratios: Iterable[float]) -> float:
    """Return how many-fold ratios are off 1 on average, too much and too little alike: exp of the mean |log|."""
    return math.exp(statistics.fmean(abs(math.log(max(ratio, 1e-6))) for ratio in ratios))


def train_seconds(run: Path) -> float | None:
    """Return the seconds that a run's training took, up to its last line in the log."""
    rows = read_metrics(run)
    return float(rows[-1]["time_s"]) if rows else None


def metrics(report: Path) -> dict[str, pd.DataFrame]:
    """Read the tables of an evaluation."""
    plain = json.loads((report / "metrics.json").read_text())
    return {name: pd.DataFrame(rows) for name, rows in plain.items() if isinstance(rows, list) and name != "summary"}


def markdown(rows: Iterable[Mapping[Any, Any]]) -> str:
    """Return rows as a Markdown table."""
    rows = list(rows)
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in head) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
