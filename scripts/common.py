"""What the studies share: where results go, hardware and commit, Markdown tables."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from imgshared.training.folder import processor

ROOT = Path(__file__).resolve().parent.parent


def provenance() -> dict[str, Any]:
    """Return hardware, versions and commit."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": f"{processor()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": version("torch"),
        "imgshared": version("imgshared"),
        "commit": git.stdout.strip() or None,
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
