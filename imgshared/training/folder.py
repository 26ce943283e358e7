"""The run folder: what is where, and what stands in it from the first second."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric

from imgshared.config import Experiment, dump
from imgshared.types import InputError


def last_path(run: Path) -> Path:
    """Where everything that resuming needs is."""
    return run / "checkpoints" / "last.safetensors"


def best_path(run: Path) -> Path:
    """Where the weights are that predict: of the least held-out loss, or of the end where nothing tells better."""
    return run / "checkpoints" / "best.safetensors"


def samples_path(run: Path) -> Path:
    """Where the pictures of fixed held-out cells are, one a validation."""
    return run / "samples"


def begin_run(experiment: Experiment, run: Path, resume: bool, fabric: Fabric) -> None:
    """Make the folder with the resolved configuration and the environment, or check that they match on resuming.

    Raises
    ------
    InputError
        For a folder that holds a run already (without `resume`), or another configuration (with it).
    """
    config = run / "config.yaml"
    problem = None
    if fabric.is_global_zero:
        problem = _problem(experiment, run, resume)
        if problem is None and not (resume and config.exists()):
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            config.write_text(dump(experiment))
            (run / "environment.json").write_text(json.dumps(environment(fabric), indent=2) + "\n")
    problem = fabric.broadcast(problem)
    if problem:
        raise InputError(problem)


def _problem(experiment: Experiment, run: Path, resume: bool) -> str | None:
    config = run / "config.yaml"
    if not config.exists():
        if run.exists() and any(run.iterdir()):
            return f"{run} exists and is not a run: choose another folder (--out)"
        return None
    if not resume:
        return f"{run} holds a run already: continue it with --resume, or choose another folder (--out)"
    changed = changes(yaml.safe_load(config.read_text()), yaml.safe_load(dump(experiment)))
    if changed:
        return f"cannot resume {run} with another configuration: {'; '.join(changed)}. Begin a new run (--out)"
    return None


def changes(before: Any, now: Any, key: str = "") -> list[str]:
    """Say which keys of nested settings differ, and how."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(k for k in now if k not in before)]
        return [c for k in names for c in changes(before.get(k), now.get(k), f"{key}.{k}" if key else k)]
    return [] if before == now else [f"{key} was {before!r}, is {now!r}"]


def environment(fabric: Fabric) -> dict[str, Any]:
    """Return versions and hardware."""
    packages = ("imgshared", "torch", "torchvision", "timm", "numpy", "anndata", "zarr", "scikit-image", "scikit-learn")
    device = fabric.device
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({processor()})",
        "devices": fabric.world_size,
        "precision": fabric._precision.precision,
        "packages": {p: version(p) for p in packages},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
    }


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
