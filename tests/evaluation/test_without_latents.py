"""The evaluation of a method that has no latents: nothing rebuilt, nothing probed, everything else."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from imgshared import api, metrics
from imgshared.config import EvaluateConfig, Experiment, dump, validate
from imgshared.data.store import CellStore
from imgshared.evaluation.evaluate import evaluate
from imgshared.evaluation.floors import Floors

SMALL: list[dict[str, object]] = [
    {"name": "regression", "channels": [4, 8], "epochs": 1},
    {"name": "linear"},
    {"name": "pix2pix", "channels": [4, 8], "discriminator_channels": [4], "epochs": 1},
    {"name": "cut", "width": 4, "blocks": 1, "discriminator_channels": [4], "epochs": 1},
    {"name": "cyclegan", "width": 4, "blocks": 1, "discriminator_channels": [4], "epochs": 1},
]


@pytest.mark.parametrize("method", SMALL, ids=lambda m: str(m["name"]))
def test_a_method_without_latents_is_judged(
    method: dict[str, object], tiny: Experiment, toy: CellStore, tmp_path: Path
) -> None:
    plan = yaml.safe_load(dump(tiny)) | {"method": method}
    run = api.train(validate(Experiment, plan, "tiny"), out=tmp_path / "run", console=Console(file=io.StringIO()))
    found = evaluate(run, toy, tmp_path / "out", EvaluateConfig(labels=("label",), factors=("size",)))
    assert set(found.fidelity["prediction"]) == {"predicted", "linear", "marker_mean"}
    assert set(found.fidelity["marker"]) == {"P1", "P2"}
    inputs = set(found.classifiers["input"])
    assert inputs >= {"real", "predicted", "chromatin", "chromatin + predicted", "real → predicted", "marker mean"}
    assert not inputs & {"full", "shared"}
    assert found.probes.empty
    assert found.metrics["probes"] == []
    html = (tmp_path / "out" / "report.html").read_text()
    assert 'id="latents"' not in html
    assert str(method["name"]) in html


def test_a_stain_that_the_method_is_given_is_none_to_judge(
    tiny: Experiment, arrays: Any, write_store: Callable[..., Path], tmp_path: Path
) -> None:
    images, measured, masks, obs = arrays
    measured[70:75, 1] = False  # without one of the sources
    store = CellStore(write_store(tmp_path / "cells.zarr", images, measured, masks, obs))
    method = {"name": "regression", "channels": [4, 8], "epochs": 1, "sources": ["DNA", "P1"]}
    plan = yaml.safe_load(dump(tiny)) | {"method": method, "data": str(store.path)}
    run = api.train(validate(Experiment, plan, "tiny"), out=tmp_path / "run", console=Console(file=io.StringIO()))
    found = evaluate(run, store, tmp_path / "out", EvaluateConfig(labels=("label",)))
    for table in (found.stains, found.fidelity, found.classifiers, found.cells):
        assert set(table["marker"]) == {"P2"}
    assert found.metrics["cells_used"]["test"] == 6
    assert "Not judged of 16 held-out cells: 5 lack some of DNA, P1, 5 show no protein to judge" in found.notes
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Stains, and the linear floor, are predicted from DNA, P1, which are not judged" in html
    assert "1 stain predicted from DNA and P1" in html.replace("of 1", "1")
    assert "suspect a leak first" not in html
    floor = found.fidelity.query("prediction == 'linear' and score == 'pearson'")["value"].item()
    floors, crops = (
        Floors(3, [0, 1]),
        run.normaliser.forward(torch.from_numpy(store.images().astype(np.float32))).numpy(),
    )
    parts = run.split.assign(store.obs)
    floors.add(crops[parts == "train"], measured[parts == "train"])
    test = (parts == "test") & measured.all(1)
    assert floor == pytest.approx(np.mean(metrics.pearson(crops[test, 2], floors.linear(2, crops[test]))), abs=1e-3)
