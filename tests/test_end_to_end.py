"""The one claim behind everything: what chromatin knows is predicted better than the floor, what it does not is not."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from imgshared import api
from imgshared.config import EvaluateConfig, Experiment, load
from imgshared.data.store import CellStore
from imgshared.evaluation.evaluate import Evaluation

SIZES = ["method.channels=[8,16,24]", "method.shared_channels=20", "method.shared_dim=16", "method.specific_dim=8"]
LENGTH = ["method.latent_epochs=40", "method.encoder_epochs=25", "train.batch_size=32", "method.lr_decoder=3e-3"]
PLAN = ["train.precision=float32", "train.accelerator=cpu", "split.test=[g4]", "split.val=[g3]"]


@pytest.fixture(scope="module")
def judged(make_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("whole")
    store = CellStore(make_store(folder / "cells.zarr", cells=400))
    experiment = load(Experiment, None, [f"data={store.path}", *SIZES, *LENGTH, *PLAN])
    run = api.train(experiment, out=folder / "run", console=Console(file=io.StringIO()))
    return api.evaluate(run, store, config=EvaluateConfig(factors=("size", "brightness")))


def test_predictions_clear_both_floors_on_an_unseen_group(judged: Evaluation) -> None:
    table = judged.fidelity[judged.fidelity["score"] == "pearson"].set_index(["marker", "prediction"])["value"]
    for marker in ("P1", "P2"):  # rings whose radius chromatin knows
        assert table[marker, "predicted"] > table[marker, "marker_mean"] + 0.05
        assert table[marker, "predicted"] > table[marker, "linear"]


def test_latents_hold_what_their_stains_show(judged: Evaluation) -> None:
    r2 = judged.probes[judged.probes["score"] == "r2"].set_index(["latent", "target"])["value"]
    assert r2["z_s [DNA]", "size"] > 0.9
    assert r2["z_s [DNA]", "brightness"] < 0.2  # of P1 alone, drawn apart from everything else
    assert r2["z_m [P1]", "brightness"] > 0.6
