"""What an evaluation has looked at, kept by all that it depends on: with another label, nothing is predicted again."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import imgshared
from imgshared.config import EvaluateConfig
from imgshared.data.store import CellStore
from imgshared.evaluation.checks import Maps
from imgshared.evaluation.collect import Part
from imgshared.prediction import Run
from imgshared.prediction.trust import FILE as TRUST

ARRAYS, TABLES = ("features", "morphology", "latents"), ("fidelity", "checks", "trust")
LIBRARIES = ("numpy", "scipy", "scikit-image", "torch")


class Keeper:
    """Parts in a folder, one file each; what is not asked for before `tidy` is removed there.

    Not for parts with crops for networks: they are large, and quick to make beside the training that they are for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._asked = folder, set[str]()

    def get(self, parts: Mapping[str, tuple[CellStore, Any]]) -> list[Part] | None:
        """Return the parts of these names, each of some cells of a store; None unless all are there and whole."""
        self._asked |= set(parts)
        try:
            return [_read(self._folder / f"{name}.npz", *cells) for name, cells in parts.items()]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # not there, or cut short: looked at again

    def put(self, names: Iterable[str], parts: Iterable[Part]) -> list[Part]:
        """Keep parts as they come, written beside, then renamed, and return them."""
        found = []
        for name, part in zip(names, parts, strict=True):
            found.append(part)
            self._folder.mkdir(parents=True, exist_ok=True)
            beside = self._folder / f"{name}.partial"
            with beside.open("wb") as file:
                np.savez(file, **dict(_flat(part)))
            beside.replace(self._folder / f"{name}.npz")
        return found

    def tidy(self) -> None:
        """Remove what this evaluation did not ask for."""
        for path in self._folder.glob("look_*"):
            if path.stem not in self._asked:
                path.unlink()


def name_of(run: Run, stores: list[CellStore], cells: list[Any], config: EvaluateConfig, more: list[Any]) -> str:
    """Name a look by all that it depends on: code, libraries, weights, calibration, cells and settings."""
    said = hashlib.blake2b(_code().encode(), digest_size=16)
    about = [run.fabric.device.type, config.sharp, config.seed, *more]
    for store in stores:  # its hash is of crops and masks: what they are called, and which count, can change
        about += [store.data_hash, store.panel.markers, store.panel.chromatin]
        said.update(np.ascontiguousarray(store.measured).tobytes())
    said.update(json.dumps(about, default=str).encode())
    for file in (run.checkpoint, run.path / "config.yaml", run.path / "contract.json", run.path / TRUST):
        said.update(hashlib.blake2b(file.read_bytes() if file.is_file() else b"none").digest())
    for rows in cells:
        said.update(np.ascontiguousarray(rows).tobytes() + b"part")
    return f"look_{said.hexdigest()}"


@cache
def _code() -> str:
    """The package's own sources and the versions of what computes."""
    root = Path(imgshared.__file__).parent
    own = hashlib.blake2b(digest_size=16)
    for path in sorted(root.rglob("*.py")):
        own.update(path.read_bytes())
    return " ".join([own.hexdigest(), *map(version, LIBRARIES)])


def _flat(part: Part) -> Iterator[tuple[str, Any]]:
    """Yield arrays by name; tables as the bytes of a Parquet file."""
    yield "measured", part.measured
    names = {kind: list(getattr(part, kind)) for kind in ARRAYS} | {"maps": list(part.maps)}
    yield "names", np.frombuffer(json.dumps(names).encode(), np.uint8)
    for kind in ARRAYS:
        for k, values in enumerate(getattr(part, kind).values()):
            yield f"{kind}/{k}", values
    for k, maps in enumerate(part.maps.values()):
        for field in dataclasses.fields(Maps):
            yield f"maps/{k}/{field.name}", np.asarray(getattr(maps, field.name))
    for name in TABLES:
        table = getattr(part, name)
        if len(table):
            file = io.BytesIO()
            table.to_parquet(file, index=False)
            yield name, np.frombuffer(file.getvalue(), np.uint8)


def _read(path: Path, store: CellStore, cells: Any) -> Part:
    with np.load(path, allow_pickle=False) as kept:
        names = json.loads(kept["names"].tobytes())
        part = Part(cells, store.obs.iloc[cells], kept["measured"])
        for kind in ARRAYS:
            key: Callable[[Any], Any] = str if kind == "latents" else tuple
            for k, name in enumerate(names[kind]):
                getattr(part, kind)[key(name)] = kept[f"{kind}/{k}"]
        for k, marker in enumerate(names["maps"]):
            fields = {field.name: kept[f"maps/{k}/{field.name}"] for field in dataclasses.fields(Maps)}
            part.maps[marker] = Maps(**fields | {"cells": int(fields["cells"])})
        for name in TABLES:
            if name in kept:
                setattr(part, name, pd.read_parquet(io.BytesIO(kept[name].tobytes())))
    return part
