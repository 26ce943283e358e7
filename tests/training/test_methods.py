"""The field's methods through the loop, on cells as they come: never stained together, hardly ever, or in pairs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from rich.console import Console

import imgshared
from imgshared.build import build_method
from imgshared.config import Experiment, dump, load
from imgshared.data.feed import mix
from imgshared.data.store import CellStore
from imgshared.methods.cyclegan import CycleGan
from imgshared.methods.linear import Linear
from imgshared.prediction import Run
from imgshared.training import checkpoint
from imgshared.training.log import read_metrics
from imgshared.training.loop import Diverged, Trainer
from imgshared.types import Batch, LossTerms

RUN = [
    "split.test=[g0]", "split.val=[g1]", "train.batch_size=8", "train.precision=float32", "train.accelerator=cpu",
    "train.log_every=1",
]  # fmt: skip
GAN = ["method.width=4", "method.blocks=1", "method.discriminator_channels=[4,6]", "method.epochs=2"]
TINY = {
    "cut": GAN,
    "fastcut": GAN,
    "cyclegan": [*GAN, "method.buffer=5"],
    "translator_unpaired": ["method.channels=[4,6]", "method.marker_dim=3", "method.discriminator_channels=[4,6]",
                            "method.epochs=2"],
    "mvae": ["method.channels=[4,6]", "method.latent_dim=6", "method.marker_dim=3", "method.epochs=2"],
    "pix2pix": ["method.channels=[4,6]", "method.discriminator_channels=[4,6]", "method.epochs=2"],
    "linear": ["method.pixels=64"],
}  # fmt: skip


@pytest.fixture
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., tuple[Run, str]]:
    """``trained(name, store, *overrides)`` trains a shipped configuration, made tiny; the run and what was said."""

    def train(name: str, store: Path, *overrides: str, out: str = "run", **how: Any) -> tuple[Run, str]:
        text = io.StringIO()
        run = imgshared.train(
            request.config.rootpath / "configs" / f"{name}.yaml", f"data={store}", *TINY[name], *RUN, *overrides,
            out=tmp_path / out, console=Console(file=text, width=400), **how,
        )  # fmt: skip
        return run, text.getvalue()

    return train


@pytest.fixture
def unpaired(arrays: Any, write_store: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``unpaired(held_out=None)``: DNA in every other cell, else P1 or P2; in g1 `held_out` alone."""

    def made(held_out: int | None = None) -> Path:
        images, measured, masks, obs = arrays
        measured[:] = False
        for channel, first, every in ((0, 0, 2), (1, 1, 4), (2, 3, 4)):
            measured[first::every, channel] = True
        if held_out is not None:
            measured[(obs["group"] == "g1").to_numpy()] = np.arange(3) == held_out
        images = (np.where(images > 0, images, 100) * measured[..., None, None]).astype(np.uint16)
        return write_store(tmp_path / "unpaired.zarr", images, measured, masks, obs)

    return made


def logged(run: Run, part: str = "train") -> list[dict[str, float]]:
    return [row for row in read_metrics(run.path) if row["split"] == part]


def state(run: Run, which: str = "last") -> dict[str, Any]:
    return checkpoint.load(run.path / "checkpoints" / f"{which}.safetensors")[0]


GAME = {"loss", "adversarial", "discriminator/loss", "discriminator/adversarial"}
ACCURACY = {"discriminator/accuracy"}
WANTED = {
    "cut": GAME | ACCURACY | {"nce", "nce_identity"},
    "fastcut": GAME | ACCURACY | {"nce"},
    "cyclegan": GAME | {"cycle", "identity", "discriminator/target/accuracy", "discriminator/source/accuracy"},
    "translator_unpaired": GAME | ACCURACY | {"full", "shared", "patch_nce", "cycle"},
}


@pytest.mark.parametrize("name", WANTED)
def test_cells_that_are_never_stained_together_teach_every_term(
    name: str, unpaired: Callable[..., Path], trained: Callable[..., tuple[Run, str]]
) -> None:
    run, said = trained(name, unpaired())
    rows = logged(run)
    assert len(rows) == 2 * 6
    for row in rows:  # balanced panels: no step lacks a side
        terms = set(row) - {"step", "epoch", "stage", "split", "time_s", "cells_per_s"}
        assert terms == WANTED[name]
        assert all(np.isfinite(row[term]) for term in terms)
    assert all({"diversity/P1", "diversity/P2"} < set(row) for row in logged(run, "val"))
    assert "no step" not in said
    assert "cannot be watched" not in said


@pytest.mark.parametrize(("held_out", "named"), [(0, "P1, P2"), (1, "P2, DNA")])
def test_held_out_cells_of_one_side_are_watched_with_training_cells_beside(
    held_out: int, named: str, unpaired: Callable[..., Path], trained: Callable[..., tuple[Run, str]]
) -> None:
    run, said = trained("cut", unpaired(held_out))
    assert f"fewer than two held-out cells show {named}: training cells are watched in their place" in said
    assert all({"diversity/P1", "diversity/P2"} < set(row) for row in logged(run, "val"))
    assert len(list((run.path / "samples").iterdir())) == 2


@pytest.mark.parametrize("settings", [("train.batch_size=1", "train.log_every=50"), ("train.accumulate=8",)])
def test_a_discriminator_without_a_step_is_said_and_stays_as_it_was(
    settings: tuple[str, ...], unpaired: Callable[..., Path], trained: Callable[..., tuple[Run, str]]
) -> None:
    run, said = trained("cut", unpaired(), "markers=[P1]", *settings, "method.epochs=1")
    assert "the discriminator had no step in the last epoch, for no part of a batch held DNA and another stain" in said
    assert not any("discriminator/loss" in row for row in logged(run))
    assert all("adversarial" in row for row in logged(run) if "nce" in row)
    torch.manual_seed(mix("weights", run.experiment.seed))
    fresh = build_method(run.experiment.method, run.panel, CellStore(run.experiment.data).crop_px).state_dict()
    now = state(run)["model"]
    assert not all(torch.equal(v, now[k]) for k, v in fresh.items() if k.startswith("generator"))
    assert all(torch.equal(v, now[k]) for k, v in fresh.items() if k.startswith("discriminator"))


def test_signs_of_trouble_come_from_the_mean_over_the_whole_epoch(
    unpaired: Callable[..., Path], trained: Callable[..., tuple[Run, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(CycleGan, "signs", lambda self, values: seen.append(dict(values)) or [])
    run, _ = trained("cyclegan", unpaired(), "train.log_every=4")  # of six steps an epoch, the last two are a report
    monkeypatch.undo()
    every, _ = trained("cyclegan", unpaired(), out="every")
    for epoch, values in enumerate(seen):
        rows = [row for row in logged(every) if row["epoch"] == epoch]
        assert "measure" not in values
        for name in ("cycle", "discriminator/source/accuracy", "loss"):
            assert values[name] == pytest.approx(np.mean([row[name] for row in rows]), rel=1e-5), name
    assert len(seen) == len(logged(run, "val")) == 2


class Killed(Exception):
    pass


def test_a_resumed_game_with_pools_equals_one_that_went_through(
    unpaired: Callable[..., Path], trained: Callable[..., tuple[Run, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, asked, loss = unpaired(), 0, CycleGan.loss

    def counted(self: CycleGan, batch: Batch, player: str) -> LossTerms:
        nonlocal asked
        asked += 1
        if asked > 17:  # of two a step, twelve an epoch: between the players' turns
            raise Killed
        return loss(self, batch, player)

    with monkeypatch.context() as patch:
        patch.setattr(CycleGan, "loss", counted)
        with pytest.raises(Killed):
            trained("cyclegan", store, "train.checkpoint_minutes=0", out="killed")
    whole, _ = trained("cyclegan", store, "train.checkpoint_minutes=0")
    resumed, _ = trained("cyclegan", store, "train.checkpoint_minutes=0", out="killed", resume=True)
    assert state(whole)["model"]["pool.count"] == 5
    for which in ("last", "best"):
        ours, theirs = state(resumed, which), state(whole, which)
        for kind in {"model", "ema"} & theirs.keys():
            for name, value in theirs[kind].items():
                assert torch.equal(ours[kind][name], value), f"{which}: {kind} {name}"
    assert [row["loss"] for row in logged(resumed)] == [row["loss"] for row in logged(whole)]


def test_each_process_goes_on_with_its_own_pool(
    unpaired: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest, in_two_processes: Callable[..., str]
) -> None:
    settings = [f"data={unpaired()}", *TINY["cyclegan"], *RUN, "method.epochs=1"]
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(dump(load(Experiment, request.config.rootpath / "configs" / "cyclegan.yaml", settings)))
    in_two_processes("train", config, "--out", out)
    tree = checkpoint.load(out / "checkpoints" / "last.safetensors")[0]
    first, second = (tree["pools"][rank] for rank in ("0", "1"))
    names = {f"{pool}.{name}" for pool in ("pool", "source_pool") for name in ("images", "markers", "count")}
    assert first.keys() == second.keys() == names
    assert all(torch.equal(value, tree["model"][name]) for name, value in first.items())
    assert not torch.equal(first["pool.images"], second["pool.images"])
    assert second["pool.count"] == 5
    trainer = Trainer(load(Experiment, config), out, True, Console(file=io.StringIO()))
    trainer.log.close()
    for rank, own in enumerate((first, second, first)):  # a third process, which was not there before
        trainer.fabric = SimpleNamespace(global_rank=rank)  # type: ignore[assignment]
        trainer._take_up(tree)
        for name, value in trainer.method.state_dict().items():
            assert torch.equal(value, own.get(name, tree["model"][name]))


def steps_without_pairs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Note of each step in which nothing was shown beside the source what it moved."""
    moved: list[list[str]] = []
    step = Trainer._step

    def spied(trainer: Trainer, batches: Any, *rest: Any) -> None:
        before = {name: p.detach().clone() for name, p in trainer.method.named_parameters()}
        step(trainer, batches, *rest)
        if not any((b.measured[:, 0] & b.measured[:, 1:].any(1)).any() for b in batches):
            moved.append([n for n, p in trainer.method.named_parameters() if not torch.equal(p, before[n])])

    monkeypatch.setattr(Trainer, "_step", spied)
    return moved


def test_a_step_that_has_nothing_to_tell_moves_no_player(
    arrays: Any,
    write_store: Callable[..., Path],
    tmp_path: Path,
    trained: Callable[..., tuple[Run, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even by the momentum of Adam, which a gradient of zero would leave to it."""
    images, measured, masks, obs = arrays
    measured[:, 1] = measured[:, 2] = np.arange(80) % 4 == 1
    store = write_store(tmp_path / "few.zarr", images * measured[..., None, None], measured, masks, obs)
    moved = steps_without_pairs(monkeypatch)
    run, _ = trained("pix2pix", store, "train.batch_size=2", "train.gradient_clip=1")
    assert len(moved) > 10
    assert moved == [[]] * len(moved)
    rows = logged(run)
    assert sum("loss" not in row for row in rows) == len(moved)  # no loss of 0 in the log either
    assert any("discriminator/loss" in row for row in rows)


@pytest.mark.parametrize("settings", [(), ("train.accumulate=2",), ("train.batch_size=1000",)])
def test_linear_is_fitted_on_every_training_cell(
    settings: tuple[str, ...], toy_path: Path, trained: Callable[..., tuple[Run, str]]
) -> None:
    run, _ = trained("linear", toy_path, "train.batch_size=14", *settings)
    assert isinstance(run.method, Linear)
    assert (run.method.ridge.xx[:, -1, -1] / 64).tolist() == [48, 24]  # P1 in all of 48 training cells, P2 in half


def test_pairs_that_come_late_are_no_divergence(
    arrays: Any, write_store: Callable[..., Path], tmp_path: Path, trained: Callable[..., tuple[Run, str]]
) -> None:
    """Nor is a fit that begins with a few cells, and with an error of nearly 0 on them."""
    images, measured, masks, obs = arrays
    measured[:, 1] = measured[:, 2] = np.arange(80) % 16 == 5
    store = write_store(tmp_path / "few.zarr", images * measured[..., None, None], measured, masks, obs)
    for batch_size in (1, 2):
        run, said = trained("linear", store, f"train.batch_size={batch_size}", out=f"run{batch_size}")
        assert sum("l2" in row for row in logged(run)) == 3
        assert "P1 is measured in 3 training cells alone" in said


def test_a_closed_form_that_is_no_number_is_not_told_to_lower_its_learning_rate(
    toy_path: Path, trained: Callable[..., tuple[Run, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Linear, "loss", lambda self, *_: LossTerms(torch.tensor(float("nan")), {"l2": torch.tensor(float("nan"))})
    )
    with pytest.raises(Diverged, match=r"is not a number in stage fit.*look for pixels") as caught:
        trained("linear", toy_path)
    assert "learning rate" not in str(caught.value)


def test_mvae_trains_and_predicts_what_was_not_measured(
    toy_path: Path, tmp_path: Path, trained: Callable[..., tuple[Run, str]]
) -> None:
    run, said = trained("mvae", toy_path, "method.lr=1e-2")
    for row in (*logged(run), *logged(run, "val")):
        for given in ("", "chromatin/", "protein/"):
            assert 0 <= row[f"{given}active_dimensions"] <= 6
            assert row[f"{given}kl_low"] <= row[f"{given}kl_median"] <= row[f"{given}kl_high"]
    assert "posterior collapse" not in said
    with pytest.warns(UserWarning, match="recover little"):  # two epochs
        path = imgshared.predict(run, toy_path, out=tmp_path / "predicted.zarr")
    written = anndata.read_zarr(path)
    assert list(written.var_names) == ["P1", "P2"]
    assert np.isfinite(written.obsm["predicted_images"]).all()
    assert (written.obsm["predicted_images"].std(0) > 0).any((1, 2)).all()  # it depends on the cell
    latents = written.obsm["X_shared"]
    assert latents.shape == (80, 6)
