"""The loop: exact resuming, ranks, early stopping, divergence, and what a run folder holds."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from imgshared.config import Experiment, dump, load
from imgshared.methods.apollo import Apollo
from imgshared.training import checkpoint
from imgshared.training.log import read_metrics
from imgshared.training.loop import Diverged, train
from imgshared.types import InputError

TINY = [
    "method.channels=[4,8]", "method.shared_channels=5", "method.shared_dim=4", "method.specific_dim=3",
    "method.latent_epochs=2", "method.encoder_epochs=2", "train.batch_size=16", "train.precision=float32",
    "train.accelerator=cpu", "train.log_every=2", "split.test=[g0]", "split.val=[g1]",
]  # fmt: skip


def experiment(store: Path, *overrides: str) -> Experiment:
    return load(Experiment, None, [f"data={store}", *TINY, *overrides])


def run(e: Experiment, out: Path, *, resume: bool = False) -> str:
    text = io.StringIO()
    train(e, out, resume=resume, console=Console(file=text, width=200))
    return text.getvalue()


def weights(out: Path, which: str = "last") -> dict[str, torch.Tensor]:
    tree, _ = checkpoint.load(out / "checkpoints" / f"{which}.safetensors")
    flat = dict(tree["model"])
    for name, table in tree.get("tables", {}).items():
        flat |= {f"{name}.{k}": v for k, v in table.items()}
    return flat


def assert_equal_runs(a: Path, b: Path) -> None:
    for which in ("last", "best"):
        first, second = weights(a, which), weights(b, which)
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), f"{which}: {name}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "cells.zarr")


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(experiment(store), out)
    return out


def test_run_folder_holds_what_a_reviewer_asks_for(whole: Path, store: Path) -> None:
    assert (whole / "checkpoints" / "best.safetensors").exists()
    assert load(Experiment, whole / "config.yaml") == experiment(store)
    contract = json.loads((whole / "contract.json").read_text())
    assert contract["split"]["test"] == ["g0"]
    assert len(contract["data_hash"]) == 64
    assert "torch" in json.loads((whole / "environment.json").read_text())["packages"]
    assert any((whole / "tensorboard").iterdir())
    rows = read_metrics(whole)
    assert {(r["stage"], r["split"]) for r in rows} == {
        ("latents", "train"),
        ("encoders", "train"),
        ("encoders", "val"),
    }
    assert all(r["loss"] > 0 for r in rows)


class Killed(Exception):
    pass


def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch, e: Experiment, out: Path) -> None:
    """Train until the given step's loss is asked for, then fall over without any clean-up of the loop."""
    asked = 0
    loss = Apollo.loss

    def counted(self: Apollo, *args: object) -> object:
        nonlocal asked
        asked += 1
        if asked > steps:
            raise Killed
        return loss(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Apollo, "loss", counted)
        with pytest.raises(Killed):
            run(e, out)


@pytest.mark.parametrize("steps", [1, 4, 6, 7, 9])  # 3 steps an epoch: within and at the ends of epochs and stages
def test_resumed_equals_uninterrupted(
    steps: int, store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = experiment(store, "train.checkpoint_minutes=0")
    killed_after(steps, monkeypatch, e, tmp_path / "run")
    run(e, tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", whole)
    keys = [(r["step"], r["split"]) for r in read_metrics(tmp_path / "run")]
    assert len(keys) == len(set(keys))
    assert keys == sorted(keys)


def test_resuming_far_behind_the_log_drops_its_tail(
    store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = experiment(store)  # checkpoints at the end of a stage alone
    killed_after(10, monkeypatch, e, tmp_path / "run")
    assert max(r["step"] for r in read_metrics(tmp_path / "run")) > 6
    run(e, tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", whole)


def command(config: Path, out: Path, *more: str, launcher: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *launcher, "-m", "imgshared.cli", "train", str(config), "--out", str(out), *more]


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_and_an_interrupted_process_go_on_exactly(how: signal.Signals, store: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    # every step writes a checkpoint, so there are many seconds to be killed in
    e = experiment(store, "method.latent_epochs=40", "method.encoder_epochs=4", "train.checkpoint_minutes=0")
    config.write_text(dump(e))
    out = tmp_path / "run"
    process = subprocess.Popen(command(config, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(out / "checkpoints" / "last.safetensors", process)
    process.send_signal(how)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if how is signal.SIGKILL else 130), said
    if how is not signal.SIGKILL:
        assert b"--resume" in said
    assert not (out / "checkpoints" / "best.safetensors").exists()  # it was stopped on the way
    run(e, out, resume=True)
    run(e, tmp_path / "straight")
    assert_equal_runs(out, tmp_path / "straight")


def test_held_out_cells_are_looked_at_as_often_as_asked(store: Path, tmp_path: Path) -> None:
    e = experiment(store, "method.latent_epochs=1", "method.encoder_epochs=4", "train.validate_every=2")
    run(e, tmp_path / "run")
    assert [r["epoch"] for r in read_metrics(tmp_path / "run") if r["split"] == "val"] == [1, 3]


def test_two_ranks_share_the_cells(store: Path, tmp_path: Path, in_two_processes: Callable[..., str]) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(dump(experiment(store)))
    in_two_processes("train", config, "--out", out)
    tree, _ = checkpoint.load(out / "checkpoints" / "last.safetensors")
    steps = tree["tables"]["shared"]["steps"]
    per_epoch = len(steps) // 16 * 16
    assert steps.sum() == 2 * per_epoch  # no cell was drawn by both ranks, none of the batch was left out
    assert steps.max() <= 2
    rows = read_metrics(out)
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)  # one rank writes the log
    losses = [r["loss"] for r in rows if (r["stage"], r["split"]) == ("latents", "train")]
    assert losses[-1] < losses[0]


METHODS = {
    "apollo": ["train.batch_size=16"],
    "translator": ["method.channels=[8,12]", "method.marker_dim=4", "method.epochs=2", "method.encoders=marker",
                   "method.weights={adversarial: 0.1, sharp: 1, patch_nce: 0.1, cycle: 0.1}", "method.translated=4",
                   "method.discriminator_channels=[4]", "augment={flips: true, gain: 0.1}"],
    "pix2pix": ["method.channels=[8,8]", "method.discriminator_channels=[4]", "method.epochs=2"],
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_learn_what_one_process_does(
    name: str, store: Path, tmp_path: Path, in_two_processes: Callable[..., str]
) -> None:
    """A batch of two parts is the same on two ranks and one after the other: noise, statistics, augmentation."""
    tiny = [*(s for s in TINY if name == "apollo" or not s.startswith("method.")), f"method.name={name}"]
    settings = [f"data={store}", *tiny, *METHODS[name], "train.ema=0.9", "train.log_every=1"]
    e = load(Experiment, None, [*settings, "train.accumulate=2"])
    run(e, tmp_path / "one")
    config = tmp_path / "two.yaml"
    config.write_text(dump(load(Experiment, None, settings)))
    in_two_processes("train", config, "--out", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    losses = [[r["loss"] for r in read_metrics(tmp_path / n) if r["split"] == "train"] for n in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) > 1


def test_more_parts_than_cells_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a batch of 16 cells cannot be cut in 17 parts"):
        run(experiment(store, "train.accumulate=17"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_early_stopping_keeps_the_best(store: Path, tmp_path: Path) -> None:
    e = experiment(store, "method.encoder_epochs=30", "method.lr_encoder=0.3", "train.patience=2", "train.diverged=1e9")
    run(e, tmp_path / "run")
    values = [r["loss"] for r in read_metrics(tmp_path / "run") if r["split"] == "val"]
    assert len(values) < 30
    assert values.index(min(values)) == len(values) - 3  # two validations waited, then the end
    tree, _ = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.safetensors")
    assert tree["position"]["best"] == pytest.approx(min(values))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.lr_decoder=1e30"], "not a number"),
        (["method.likelihood=mse", "method.norm_weight=1e6", "method.lr_latent=50"], "grew"),
    ],
)
def test_divergence_stops_and_keeps_good_weights(overrides: list[str], said: str, store: Path, tmp_path: Path) -> None:
    e = experiment(store, *overrides, "method.latent_epochs=40", "train.checkpoint_minutes=0", "train.log_every=1")
    with pytest.raises(Diverged, match=said) as caught:
        run(e, tmp_path / "run")
    assert "learning rate" in str(caught.value)
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    if last.exists():
        assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())


def test_streaming_from_disk_trains_the_same(store: Path, whole: Path, tmp_path: Path) -> None:
    run(experiment(store, "train.residency=stream"), tmp_path / "run")
    first, second = weights(whole), weights(tmp_path / "run")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_an_existing_run_is_not_overwritten(store: Path, whole: Path) -> None:
    with pytest.raises(InputError, match="--resume"):
        run(experiment(store), whole)


def test_resuming_with_another_configuration_names_the_key(store: Path, whole: Path) -> None:
    with pytest.raises(InputError, match=r"method\.lr_decoder was 0\.001, is 0\.002"):
        run(experiment(store, "method.lr_decoder=0.002"), whole, resume=True)


def test_resuming_on_other_data_is_refused(
    whole: Path, store: Path, tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    kept = store.with_suffix(".kept")
    store.rename(kept)
    try:
        make_store(store, seed=9)
        with pytest.raises(InputError, match="data hash"):
            run(experiment(store), out, resume=True)
    finally:
        shutil.rmtree(store)
        kept.rename(store)
