"""What is fitted on held-out cells once the weights stand lies in both checkpoints, and belongs to their weights."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from imgshared.config import Experiment, load
from imgshared.data.feed import Feed
from imgshared.data.store import CellStore
from imgshared.methods.translator import Translator
from imgshared.prediction import load_run
from imgshared.training.checkpoint import load as read
from imgshared.training.loop import train

SETTINGS = [
    "method.name=translator", "method.channels=[4,6]", "method.marker_dim=3", "method.epochs=3", "method.lr=0.02",
    "method.weights={adversarial: 0, sharp: 0}", "train.batch_size=16", "train.precision=float32",
    "train.accelerator=cpu", "train.ema=0.9", "split.test=[g0]",
]  # fmt: skip


def run(store: Path, out: Path, *overrides: str, resume: bool = False) -> Path:
    e = load(Experiment, None, [f"data={store}", *SETTINGS, *overrides])
    return train(e, out, resume=resume, console=Console(file=io.StringIO()))


def fitted(out: Path, which: str) -> torch.Tensor:
    tree, _ = read(out / "checkpoints" / f"{which}.safetensors")
    found: torch.Tensor = tree["model"]["stacking"]
    return found


def settle_again(out: Path, store: CellStore, which: str) -> torch.Tensor:
    opened = load_run(out, checkpoint=which)
    cells = (opened.split.assign(store.obs) == "val").nonzero()[0]
    assert store.measured[cells].all(1).any()
    feed = Feed(store, cells, [0, 1, 2], opened.normaliser, torch.device("cpu"), "memory", 16)
    assert torch.equal(opened.method.stacking, fitted(out, which))
    opened.method.stacking.fill_(0.5)
    with torch.no_grad():
        opened.method.settle(feed.once(99), lambda sums: sums)
    found: torch.Tensor = opened.method.stacking
    return found


def test_both_checkpoints_hold_what_fits_their_weights(toy_path: Path, tmp_path: Path) -> None:
    out = run(toy_path, tmp_path / "run", "split.val=[g1]")
    before = {which: fitted(out, which) for which in ("best", "last")}
    for which, held in before.items():
        torch.testing.assert_close(settle_again(out, CellStore(toy_path), which), held)
        assert (held < 1).any()  # else nothing was fitted
    run(toy_path, out, "split.val=[g1]", resume=True)  # finished: nothing moves
    for which, held in before.items():
        assert torch.equal(fitted(out, which), held)


def test_it_is_fitted_to_the_weights_that_would_predict(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(method: Translator, *_: object) -> str:
        method.stacking.fill_(method.network.head.last.weight.abs().mean())
        return ""

    monkeypatch.setattr(Translator, "settle", told)
    out = run(toy_path, tmp_path / "run", "split.val=[g1]", "method.lr=0.05", "method.epochs=8")
    found = set()
    for which in ("best", "last"):
        method = load_run(out, checkpoint=which).method
        weights = method.network.head.last.weight.abs().mean()
        assert torch.equal(method.stacking, weights.expand(3))
        found.add(weights.item())
    assert len(found) == 2  # the best were not the last


def test_without_held_out_cells_nothing_is_fitted(toy_path: Path, tmp_path: Path) -> None:
    out = run(toy_path, tmp_path / "run", "split.val=[]")
    assert torch.equal(fitted(out, "best"), torch.ones(3))
