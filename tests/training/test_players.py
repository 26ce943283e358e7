"""The loop with two players: exact resuming, the average that predicts, falling rates, pictures, notes, divergence."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.optim import Adam

from imgshared.config import Experiment, load
from imgshared.data.feed import Feed
from imgshared.methods.translator import Translator
from imgshared.prediction import load_run
from imgshared.training import checkpoint, loop
from imgshared.training.log import read_metrics
from imgshared.training.loop import Diverged, Trainer, train
from imgshared.types import Batch, InputError, LossTerms

TINY = [
    "method.name=translator", "method.channels=[4,6]", "method.marker_dim=3", "method.discriminator_channels=[4,5]",
    "method.discriminator_sees_source=false",
    "method.weights.adversarial=0.1", "method.weights.r1=0.1", "method.weights.patch_nce=0.1", "method.epochs=4",
    "method.lr=0.01", "method.lr_discriminator=0.002", "method.lr_decay=0.5", "train.ema=0.9", "train.balance=panels",
    "train.batch_size=16", "train.precision=float32", "train.accelerator=cpu", "train.log_every=2",
    "split.test=[g0]", "split.val=[g1]",
]  # fmt: skip
UNPAIRED = [
    "method.weights.cross=0", "method.weights.cycle=1", "method.weights.identity=1", "markers=[DNA,P1]",
]  # fmt: skip
STEPS, EPOCHS = 3, 4  # 48 training cells


def experiment(store: Path, *overrides: str) -> Experiment:
    return load(Experiment, None, [f"data={store}", *TINY, *overrides])


def run(e: Experiment, out: Path, *, resume: bool = False) -> str:
    text = io.StringIO()
    train(e, out, resume=resume, console=Console(file=text, width=200))
    return text.getvalue()


def tree(out: Path, which: str) -> dict[str, Any]:
    return checkpoint.load(out / "checkpoints" / f"{which}.safetensors")[0]


class Seen:
    """What happened in a run: weights and learning rates after each step."""

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.weights: list[dict[str, torch.Tensor]] = []
        self.rates: list[dict[str, float]] = []

    def spy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        step = Trainer._step

        def spied(trainer: Trainer, batch: Batch, stage: Any, optimizers: Any, meter: Any) -> None:
            self.start = self.start or self.copy(trainer)
            step(trainer, batch, stage, optimizers, meter)
            self.weights.append(self.copy(trainer))
            self.rates.append({player: o.param_groups[0]["lr"] for player, o in optimizers.items()})

        monkeypatch.setattr(Trainer, "_step", spied)

    @staticmethod
    def copy(trainer: Trainer) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trainer.method.named_parameters()}

    def average(self, steps: int, decay: float = 0.9) -> dict[str, torch.Tensor]:
        values = self.start
        for t, now in enumerate(self.weights[:steps]):
            keep = min(decay, (1 + t) / (10 + t))
            values = {name: keep * values[name] + (1 - keep) * now[name] for name in now}
        return values


@pytest.fixture(scope="module")
def whole(toy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen, str]:
    """A run without interruption."""
    out, seen = tmp_path_factory.mktemp("whole") / "run", Seen()
    with pytest.MonkeyPatch.context() as patch:
        seen.spy(patch)
        said = run(experiment(toy_path), out)
    return out, seen, said


class Killed(Exception):
    pass


@pytest.mark.parametrize("calls", [3, 8, 13, 22])  # of two a step, six an epoch: before and between the players' turns
def test_resumed_equals_uninterrupted(
    calls: int, toy_path: Path, whole: tuple[Path, Seen, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e, asked, loss = experiment(toy_path, "train.checkpoint_minutes=0"), 0, Translator.loss

    def counted(self: Translator, batch: Batch, player: str) -> LossTerms:
        nonlocal asked
        asked += 1
        if asked > calls:
            raise Killed
        return loss(self, batch, player)

    with monkeypatch.context() as patch:
        patch.setattr(Translator, "loss", counted)
        with pytest.raises(Killed):
            run(e, tmp_path / "run")
    left = tree(tmp_path / "run", "last")
    assert left["position"]["total"] == calls // 2
    assert set(left["optimizers"]) == {"generator", "discriminator"}
    run(e, tmp_path / "run", resume=True)
    for which in ("last", "best"):
        ours, theirs = tree(tmp_path / "run", which), tree(whole[0], which)
        assert ours["position"]["total"] == theirs["position"]["total"]
        for kind in ("model", "ema"):
            for name, value in theirs.get(kind, {}).items():
                assert torch.equal(ours[kind][name], value), f"{which}: {kind} {name}"
    kept = [
        {k: v for k, v in r.items() if k != "time_s"} for r in read_metrics(tmp_path / "run") if r["split"] == "val"
    ]
    assert kept == [
        {k: v for k, v in r.items() if k != "time_s"} for r in read_metrics(whole[0]) if r["split"] == "val"
    ]


def test_the_average_is_what_validates_and_predicts(whole: tuple[Path, Seen, str]) -> None:
    out, seen, _ = whole
    assert len(seen.weights) == STEPS * EPOCHS
    best, last = tree(out, "best"), tree(out, "last")
    at = best["position"]["total"]
    assert at % STEPS == 0
    for name, value in seen.average(at).items():
        torch.testing.assert_close(best["model"][name], value, atol=1e-6, rtol=1e-4)
        assert torch.equal(last["model"][name], seen.weights[-1][name])  # to go on from
    end = dict(load_run(out, checkpoint="last").method.named_parameters())
    for name, value in seen.average(STEPS * EPOCHS).items():
        torch.testing.assert_close(last["ema"][name], value, atol=1e-6, rtol=1e-4)
        assert torch.equal(end[name], last["ema"][name])
    assert at == STEPS * EPOCHS  # with adversarial terms `best` is the end of the training


def test_without_adversarial_terms_best_is_the_least_held_out_loss(toy_path: Path, tmp_path: Path) -> None:
    overrides = (
        "method.weights.adversarial=0",
        "method.discriminator_channels=[32,64,128]",
        "method.discriminator_sees_source=true",
        "method.lr=0.05",
    )
    run(experiment(toy_path, *overrides, "method.weights.r1=0", "method.lr_discriminator=1e-3"), tmp_path / "run")
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if r["split"] == "val"]
    best = tree(tmp_path / "run", "best")["position"]
    assert best["best"] == pytest.approx(min(losses))
    assert losses.index(min(losses)) == best["total"] // STEPS - 1


def test_the_held_out_loss_is_that_of_the_average(whole: tuple[Path, Seen, str], toy_path: Path) -> None:
    opened = load_run(whole[0])
    store = loop.CellStore(toy_path)
    cells = (opened.split.assign(store.obs) == "val").nonzero()[0]
    feed = Feed(store, cells, [0, 1, 2], opened.normaliser, torch.device("cpu"), "memory", 16)
    (batch,) = feed.once(99)
    with torch.no_grad():
        value = opened.method.validate(batch).total.item()
    held_out = [r["loss"] for r in read_metrics(whole[0]) if r["split"] == "val"]
    assert value == pytest.approx(held_out[-1], rel=1e-5)


def test_rates_fall_linearly_to_zero_in_the_last_part(whole: tuple[Path, Seen, str]) -> None:
    n = STEPS * EPOCHS
    for player, lr in (("generator", 0.01), ("discriminator", 0.002)):
        rates = [r[player] for r in whole[1].rates]
        assert rates == pytest.approx([lr * min(1, (n - t) / n / 0.5) for t in range(n)])
        assert rates[: n // 2] == [lr] * (n // 2)
        assert 0 < rates[-1] == pytest.approx(lr * 2 / n)


def test_without_decay_rates_stay(toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    seen.spy(monkeypatch)
    run(experiment(toy_path, "method.lr_decay=0", "method.epochs=2", "train.ema=0"), tmp_path / "run")
    assert {r["generator"] for r in seen.rates} == {0.01}
    last = tree(tmp_path / "run", "last")
    assert not last["ema"]
    assert all(torch.equal(last["model"][k], v) for k, v in seen.weights[-1].items())
    opened = load_run(tmp_path / "run", checkpoint="last").method
    assert all(torch.equal(p, seen.weights[-1][k]) for k, p in opened.named_parameters())


def test_pictures_and_diversity_of_every_validation(whole: tuple[Path, Seen, str]) -> None:
    files = sorted((whole[0] / "samples").iterdir())
    assert [f.name for f in files] == [f"{STEPS * (e + 1):07d}.png" for e in range(EPOCHS)]
    pictures = [np.asarray(Image.open(f)) for f in files]
    assert {p.shape for p in pictures} == {
        (2 * 14 + 6 * (64 + 2), 5 * (64 + 2))
    }  # DNA, then P1 and P2 real and predicted
    assert (pictures[0][:, :132] == pictures[-1][:, :132]).all()  # the same cells, the same real stains
    assert (pictures[0] != pictures[-1]).any()  # other predictions
    rows = read_metrics(whole[0])
    for row in rows:
        assert ({"diversity/P1", "diversity/P2"} <= set(row)) == (row["split"] == "val")
        assert ("discriminator/accuracy" in row) == (row["split"] == "train")


def test_markers_of_few_cells_are_named(
    whole: tuple[Path, Seen, str], toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "note: P2 is measured in 24 training cells alone" in whole[2]
    assert "note: P1 is measured in 48 training cells alone" in whole[2]
    monkeypatch.setattr("imgshared.training.notes.FEW_CELLS", 48)
    said = run(experiment(toy_path, "method.epochs=1"), tmp_path / "run")
    assert "P2 is measured in 24" in said
    assert "P1 is measured in" not in said


def test_signs_of_trouble_are_said_once_and_not_at_the_very_start(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgshared.training.watch.COLLAPSED", 1e9)
    monkeypatch.setattr(
        Translator, "signs", lambda self, values: [f"all is not well ({values['discriminator/accuracy']:.3f})"]
    )
    said = run(experiment(toy_path), tmp_path / "run")
    for sentence in ("predicted P1 hardly differs", "predicted P2 hardly differs", "all is not well"):
        assert said.count(sentence) == 1
        assert f"note, epoch 1: {sentence}" in said
    assert "epoch 0" not in said


def scripted(monkeypatch: pytest.MonkeyPatch, term: str, extra: Callable[[int], float]) -> None:
    """Add a number to a term of each step's loss."""
    loss, steps = Translator._generator_loss, 0

    def changed(self: Translator, batch: Batch) -> LossTerms:
        nonlocal steps
        terms, steps = loss(self, batch), steps + 1
        more = extra(steps)
        return LossTerms(terms.total + more, {**terms.parts, term: terms.parts[term] + more})

    monkeypatch.setattr(Translator, "_generator_loss", changed)


def test_while_one_player_moves_the_others_networks_gather_no_gradient(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, turns = Translator.loss, []

    def noted(self: Translator, batch: Batch, player: str) -> LossTerms:
        moving = {name.split(".")[0] for name, p in self.named_parameters() if p.requires_grad}
        turns.append((player, moving))
        return loss(self, batch, player)

    monkeypatch.setattr(Translator, "loss", noted)
    run(experiment(toy_path, "method.epochs=1"), tmp_path / "run")
    assert turns == [("generator", {"network", "projection"}), ("discriminator", {"discriminator"})] * STEPS


def test_a_game_that_swings_goes_on_and_a_growing_error_ends_it(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = experiment(toy_path, "train.log_every=1")
    with monkeypatch.context() as patch:
        scripted(patch, "adversarial", lambda step: 1e4 * (step % 2) if step > 3 else 0.0)
        run(e, tmp_path / "swings")
    assert tree(tmp_path / "swings", "last")["position"]["total"] == STEPS * EPOCHS
    with monkeypatch.context() as patch:
        scripted(patch, "cross", lambda step: 0.0 if step < 5 else 100.0 * step)
        with pytest.raises(Diverged, match=r"the loss grew to .* epoch 1, step 5"):
            run(e, tmp_path / "grows")
    with monkeypatch.context() as patch:
        scripted(patch, "adversarial", lambda step: 0.0 if step < 8 else float("nan"))
        with pytest.raises(Diverged, match="is not a number"):
            run(e, tmp_path / "nan")


def test_what_is_no_number_on_held_out_cells_or_in_the_weights_ends_it(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = experiment(toy_path, "train.checkpoint_minutes=0")
    validate, saved = Translator.validate, []

    def changed(self: Translator, batch: Batch) -> LossTerms:
        terms = validate(self, batch)
        return LossTerms(terms.total * float("nan"), terms.parts) if self.progress > 0.5 else terms

    with monkeypatch.context() as patch:
        patch.setattr(Translator, "validate", changed)
        with pytest.raises(Diverged, match=r"on held-out cells is not a number in stage .*is kept: .*last"):
            run(e, tmp_path / "held_out")
    step = Adam.step

    def broken(self: Adam, *args: Any) -> None:
        step(self, *args)
        saved.append(self.param_groups[0]["params"][-1])
        if len(saved) > 2 * STEPS:  # two players
            saved[-1].data.view(-1)[0] = float("inf")

    with monkeypatch.context() as patch:
        patch.setattr(Adam, "step", broken)
        with pytest.raises(Diverged, match=r"\w+\.\w+.* of the model is not finite"):
            run(e, tmp_path / "weights")
    kept = tree(tmp_path / "weights", "last")
    assert kept["position"]["total"] == STEPS
    assert all(value.isfinite().all() for value in kept["model"].values())


def test_terms_that_join_later_are_no_divergence(toy_path: Path, tmp_path: Path) -> None:
    e = experiment(toy_path, "method.translation_from=0.5", "method.weights.patch_nce=100", "train.log_every=1")
    run(e, tmp_path / "run")
    rows = [r for r in read_metrics(tmp_path / "run") if r["split"] == "train"]
    joined = [r["step"] for r in rows if "patch_nce" in r]
    assert joined == [r["step"] for r in rows if "adversarial" in r] == list(range(7, 13))
    assert rows[6]["loss"] > 50 * rows[5]["loss"]


@pytest.fixture
def unpaired(arrays: Any, write_store: Callable[..., Path], tmp_path: Path) -> Path:
    """DNA in a quarter of the cells, P1 in the others, never both."""
    images, measured, masks, obs = arrays
    measured[:] = False
    measured[::4, 0] = True
    measured[:, 1] = ~measured[:, 0]
    return write_store(tmp_path / "cells.zarr", images * measured[..., None, None], measured, masks, obs)


def test_cells_that_cannot_teach_it_are_refused_before_a_folder_is_made(unpaired: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"method\.weights\.cross needs cells with two stains"):
        run(experiment(unpaired, "markers=[DNA,P1]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_free_latents_and_balanced_panels_exclude_each_other(toy_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.balance=panels may draw a cell twice"):
        run(
            load(
                Experiment,
                None,
                [f"data={toy_path}", "train.balance=panels", "split.test=[g0]", "method.channels=[8,96]"],
            ),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_rates_and_validations_follow_shorter_epochs(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, out = Seen(), tmp_path / "run"
    seen.spy(monkeypatch)
    run(experiment(toy_path, "train.steps_per_epoch=2"), out)
    assert len(seen.weights) == 2 * EPOCHS < STEPS * EPOCHS
    rates = [rate["generator"] for rate in seen.rates]
    assert rates[:4] == [0.01] * 4
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] <= 0.0025
    assert [row["step"] for row in read_metrics(out) if row["split"] == "val"] == [2, 4, 6, 8]


@pytest.mark.parametrize("method", [("apollo", "method.channels=[8,96]"), ("linear",)])
def test_short_epochs_are_refused_where_each_cell_counts_once(
    method: tuple[str, ...], toy_path: Path, tmp_path: Path
) -> None:
    name, *settings = method
    words = [f"data={toy_path}", f"method.name={name}", "train.steps_per_epoch=2", "split.test=[g0]", *settings]
    with pytest.raises(InputError, match=r"train\.steps_per_epoch=2 leaves cells out of an epoch"):
        run(load(Experiment, None, words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unpaired_cells_meet_in_every_batch_and_the_end_is_the_best(
    unpaired: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[Sequence[int]] = []
    loss = Translator._generator_loss

    def noted(self: Translator, batch: Batch) -> LossTerms:
        shares.append(batch.measured.sum(0).tolist())
        return loss(self, batch)

    monkeypatch.setattr(Translator, "_generator_loss", noted)
    run(experiment(unpaired, *UNPAIRED), tmp_path / "run")
    assert shares == [[8, 8]] * (STEPS * EPOCHS)
    best, last = tree(tmp_path / "run", "best"), tree(tmp_path / "run", "last")
    assert all(torch.equal(best["model"][name], value) for name, value in last["ema"].items())
    assert all(
        {"adversarial", "patch_nce", "cycle"} < set(r) for r in read_metrics(tmp_path / "run") if r["split"] == "train"
    )


def test_a_player_moves_no_further_than_its_clipped_gradient(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, *args: Any) -> Any:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    run(experiment(toy_path, "method.epochs=1"), tmp_path / "free")
    free, norms[:] = list(norms), []
    bound = sorted(free)[len(free) // 2]
    run(experiment(toy_path, "method.epochs=1", f"train.gradient_clip={bound}"), tmp_path / "clipped")
    assert max(free) > bound * 1.01
    assert max(norms) <= bound * 1.001
