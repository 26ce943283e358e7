"""A toy cell store and a tiny trained run, small enough for every test to use."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from rich.console import Console

from imgshared import api
from imgshared.build import build_method
from imgshared.config import Experiment, validate
from imgshared.data.panel import Panel
from imgshared.data.store import CellStore, StoreWriter, panel_table
from imgshared.prediction import Run

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # and a process that a test starts must add up in the same order

MARKERS = ("DNA", "P1", "P2")


def write_cells(
    path: Path, images: np.ndarray, measured: np.ndarray, masks: np.ndarray, obs: pd.DataFrame, **changes: Any
) -> Path:
    """Write a store of given crops; `changes` are a panel, or entries of the store's info."""
    panel = changes.pop("panel", Panel(MARKERS, "DNA"))
    inside = masks[:, None].astype(bool)
    means = (images * inside).sum((2, 3)) / inside.sum((2, 3))
    writer = StoreWriter(path, overwrite=True)
    writer.append(single_cell_images=images, cell_masks=masks)
    info = {"kind": "cells", "crop_px": images.shape[-1], "pixel_size_um": 0.5, "dtype": str(images.dtype)}
    return writer.finish(
        obs,
        panel_table(panel),
        np.where(measured, means, np.nan),
        layers={"measured": measured},
        obsm={"spatial": np.zeros((len(obs), 2))},
        info=info | changes,
    )


def toy_cells(cells: int = 80, groups: int = 5, px: int = 16, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Return images (n, 3, px, px) uint16, measured, masks, obs: a disc of DNA, two rings; P2 in every other cell."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:px, :px] - px / 2
    radius = rng.uniform(px / 6, px / 3, cells)
    r = radius[:, None, None]
    distance = np.hypot(yy, xx)[None]
    brightness = rng.uniform(0.5, 1.5, (2, cells))[..., None, None]
    rings = [500 * (np.abs(distance - r * k) < 1.5) * b + 100 for k, b in zip((0.5, 1.0), brightness, strict=True)]
    measured = np.ones((cells, 3), bool)
    measured[::2, 2] = False
    images = rng.poisson(np.stack([1000 * (distance < r) + 100, *rings], 1)).astype(np.uint16)
    obs = pd.DataFrame(
        {
            "image": [f"image{i * groups // cells}" for i in range(cells)],
            "group": pd.Categorical([f"g{i * groups // cells}" for i in range(cells)]),
            "label": pd.Categorical(np.where(np.arange(cells) % 3 == 0, "treated", "control")),
            "size": radius,
            "brightness": brightness[0].ravel(),
        },
        index=pd.Index([f"cell{i}" for i in range(cells)], name="cell_id"),
    )
    return (images * measured[..., None, None]).astype(np.uint16), measured, (distance < r).astype(np.uint8), obs


@pytest.fixture(autouse=True)
def same_draws(request: pytest.FixtureRequest) -> None:
    """A test draws the same from its module's generator whatever ran before it."""
    if hasattr(request.module, "rng"):
        request.module.rng = np.random.default_rng(1)  # what the module drew for all its tests is of another


@pytest.fixture(scope="session")
def make_store() -> Callable[..., Path]:
    """``make_store(path, cells=80, groups=5, px=16, seed=0)`` writes a toy store (again, where there is one)."""

    def make(path: Path, **sizes: int) -> Path:
        images, measured, masks, obs = toy_cells(**sizes)
        return write_cells(path, images, measured, masks, obs)

    return make


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> Path:
    """The path of a toy store that no test changes."""
    return make_store(tmp_path_factory.mktemp("toy") / "cells.zarr")


@pytest.fixture(scope="session")
def toy(toy_path: Path) -> CellStore:
    """The toy store: DNA and P1 in 80 cells of 5 groups, P2 in every other one."""
    return CellStore(toy_path)


@pytest.fixture(scope="session")
def tiny(toy_path: Path) -> Experiment:
    """A configuration that trains on the toy store in seconds."""
    method = {"channels": [8, 16, 12], "shared_channels": 8, "shared_dim": 8, "specific_dim": 4, "marker_dim": 4}
    epochs = {"latent_epochs": 2, "encoder_epochs": 2}
    plan = {
        "data": str(toy_path),
        "split": {"val": ["g3"], "test": ["g4"]},
        "method": {"name": "apollo", **method, **epochs},
        "train": {"batch_size": 16, "precision": "float32", "accelerator": "cpu"},
    }
    return validate(Experiment, plan, "tiny")


@pytest.fixture(scope="session")
def trained_run(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """apollo, trained for a moment on the toy store in float32."""
    return api.train(tiny, out=tmp_path_factory.mktemp("trained") / "run", console=Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def untrained(trained_run: Run) -> Callable[[Any], Run]:
    """``untrained(method_config)`` is the trained run with another method, of random weights."""

    def opened(config: Any) -> Run:
        torch.manual_seed(0)
        method = build_method(config, trained_run.panel, trained_run.contract.crop_px)
        with torch.no_grad():
            for p in method.parameters():  # what starts at zero would hide a mistake
                p.add_(0.05 * torch.randn_like(p))
        return replace(trained_run, method=method.eval(), experiment=replace(trained_run.experiment, method=config))

    return opened


@pytest.fixture(scope="session")
def write_store() -> Callable[..., Path]:
    """``write_store(path, images, measured, masks, obs, **changes)`` writes any arrays; see `write_cells`."""
    return write_cells


@pytest.fixture
def arrays() -> tuple[Any, Any, Any, Any]:
    """images, measured, masks and obs of the toy store, to be changed and written by `write_store`."""
    return toy_cells()


@pytest.fixture(scope="session")
def in_two_processes() -> Callable[..., str]:
    """``in_two_processes(*words)`` runs ``imgshared <words>`` under torchrun and returns what it printed."""

    def run(*words: Any) -> str:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
        command = [*launcher, "imgshared.cli", *map(str, words)]
        done = subprocess.run(command, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return done.stdout.decode()

    return run


def _write_image(
    path, data, names=("DNA", "LaminB1"), version="0.5", axes="cyx", unit="micrometer", change=lambda meta: None
):
    """A two-level pyramid."""
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    whole = data[None, :, None] if axes == "tczyx" else data
    datasets = []
    for level in range(2):
        each = whole[..., :: 2**level, :: 2**level]
        array = group.create_array(
            str(level), shape=each.shape, chunks=(*(1,) * (len(axes) - 2), 32, 32), dtype=each.dtype
        )
        array[:] = each
        scale = [0.5 * 2**level if a in "yx" else 1.0 for a in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    kinds = {"c": {"type": "channel"}, "t": {"type": "time"}}
    named = [{"name": a, **kinds.get(a, {"type": "space", **({"unit": unit} if unit else {})})} for a in axes]
    meta = {"multiscales": [{"axes": named, "datasets": datasets, "name": "image"}]}
    if names:
        window = {"start": 0, "end": 200, "min": 0, "max": 65535}
        meta["omero"] = {"channels": [{"label": n, "color": "FFFFFF", "window": window} for n in names]}
    if version == "0.5":
        meta = {"ome": {"version": "0.5", **meta}}
    else:
        meta["multiscales"][0]["version"] = "0.4"
    change(meta)
    group.attrs.update(meta)
    return path


def _write_plate(path, fields, version="0.5"):
    """Wells A/1 and B/2 with two fields each."""
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    wells = [{"path": p, "rowIndex": i, "columnIndex": i} for i, p in enumerate(("A/1", "B/2"))]
    plate = {
        "rows": [{"name": "A"}, {"name": "B"}],
        "columns": [{"name": "1"}, {"name": "2"}],
        "wells": wells,
        "name": "p",
    }
    new = version == "0.5"
    group.attrs.update({"ome": {"version": "0.5", "plate": plate}} if new else {"plate": plate | {"version": "0.4"}})
    rows = {row: group.create_group(row) for row in "AB"}
    for well in wells:
        row, column = well["path"].split("/")
        images = {"images": [{"path": "0"}, {"path": "1"}]}
        here = rows[row].create_group(column)
        here.attrs.update({"ome": {"version": "0.5", "well": images}} if new else {"well": images | {"version": "0.4"}})
        for field in "01":
            _write_image(path / well["path"] / field, fields(well["path"], field), version=version)
    return path


@pytest.fixture(scope="session")
def write_image():
    """Write a two-level OME-Zarr: (path, (C, Y, X) or (Y, X) pixels, names, version, axes, unit, change)."""
    return _write_image


@pytest.fixture(scope="session")
def write_plate():
    """Write wells A/1 and B/2 of two fields each: (path, pixels by (well, field), version)."""
    return _write_plate
