"""The training loop: one for all methods, exact on resuming."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim import Adam

from imgshared.build import build_augment, build_measured, build_method, build_normaliser, build_panel, build_split
from imgshared.config import Experiment
from imgshared.data.feed import Feed, choose_residency, mix
from imgshared.data.store import CellStore
from imgshared.methods.base import Method, Stage
from imgshared.models.buffer import pool_state
from imgshared.training.checkpoint import Contract, load, save
from imgshared.training.devices import average_gradients, gather_rows, gather_states, lay_out, make_fabric
from imgshared.training.ema import Ema
from imgshared.training.folder import begin_run, best_path, last_path, samples_path
from imgshared.training.interrupt import Interrupt
from imgshared.training.log import RunLog
from imgshared.training.meter import MEASURE, Meter
from imgshared.training.notes import Notes, about_cells, refuse_ignored, refuse_other_epochs
from imgshared.training.position import Position
from imgshared.training.settle import settle
from imgshared.training.statistics import BatchStatistics
from imgshared.training.watch import Watch, collapsed, find_cells
from imgshared.types import Batch, InputError

SETTLED = 0.34  # of a stage: before that every method looks collapsed
SHOWN = ("loss", "full", "shared", "cross", "error", "l1", "nce", "cycle", "adversarial", "kl", "z_shared")


class Diverged(InputError):
    """The loss became NaN or grew far beyond its best."""


def train(experiment: Experiment, run: Path, *, resume: bool = False, console: Console | None = None) -> Path:
    """Train a method and write a run folder.

    Parameters
    ----------
    experiment
        The whole configuration.
    run
        The folder to write: resolved configuration, environment, split, log, `last` and `best` checkpoints.
    resume
        Continue where the run's last checkpoint stands; on a CPU the weights come out bit for bit as if uninterrupted.

    Raises
    ------
    InputError
        For unusable data or configuration, an existing run without `resume`, or a changed configuration with it.
    Diverged
        Where the loss is NaN or diverges; the last good checkpoint is kept.
    """
    trainer = Trainer(experiment, run, resume, console or Console())
    trainer.fit()
    return run


class Trainer:
    """One run: the objects of a configuration and how far they are."""

    def __init__(self, experiment: Experiment, run: Path, resume: bool, console: Console) -> None:
        if experiment.ensemble:
            raise InputError(
                "ensemble: train each member with its seed, then `imgshared ensemble` makes one run of them"
            )
        self.experiment, self.run, self.config = experiment, run, experiment.train
        store = CellStore(experiment.data)
        panel, split = build_panel(experiment, store), build_split(experiment, store)
        self.fabric = make_fabric(self.config.accelerator, self.config.precision)
        measured = build_measured(experiment, store, panel)
        normaliser = build_normaliser(experiment, store, panel, split, measured)
        self.contract = Contract(
            panel, store.crop_px, store.pixel_size_um, str(store.dtype), store.mask_neighbours, normaliser, split,
            store.data_hash,
        )  # fmt: skip
        self.augment = build_augment(experiment.augment, experiment.method)
        torch.manual_seed(mix("weights", experiment.seed))
        method = build_method(experiment.method, panel, store.crop_px)
        tree = self._saved(run) if resume else {}
        parts, some_stain = split.assign(store.obs), measured.any(1)
        cells = {part: ((parts == part) & some_stain).nonzero()[0] for part in ("train", "val")}
        self._unstained = int((parts == "train").sum()) - len(cells["train"])
        self._stained = torch.from_numpy(measured[cells["train"]])
        method.prepare(self._stained, mix("prepare", experiment.seed))
        refuse_ignored(self.config, method.stages)
        refuse_other_epochs(self.config, method)
        self._refuse_empty_parts(len(cells["train"]))
        begin_run(experiment, run, resume, self.fabric)  # after all that may refuse the configuration
        if self.fabric.is_global_zero:
            (run / "contract.json").write_text(json.dumps(self.contract.to_dict(), indent=2) + "\n")
        self.feeds = {part: self._feed(store, cells, part, measured) for part in cells}
        self.method: Method = method.to(self.fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        method.world = self.fabric.world_size
        self.statistics = BatchStatistics(method, self.config.accumulate, self.fabric.world_size)
        self.position = Position()
        self.ema = Ema(method, self.config.ema) if self.config.ema else None
        self._resumed_optimizers: dict[str, Any] = {}
        if tree:
            self._take_up(tree)
        self.log = RunLog(run, self.position.total, active=self.fabric.is_global_zero, console=console)
        self.interrupt, self.notes = Interrupt(), Notes(self.log.say)
        if resume and not tree:
            self.notes.of_run([f"{run} holds no checkpoint to resume: the training begins anew"])
        self._last = dict[str, float]()  # the mean terms of the last epoch

    def fit(self) -> None:
        """Run the remaining stages."""
        train, val, method = self.feeds["train"], self.feeds["val"], self.method
        self.log.say(
            f"[bold]{self.experiment.method.name}[/] on {len(train):,} cells ({len(val):,} held out), "
            f"{', '.join(self.contract.panel.markers)}; {self.fabric.device}, {self.fabric._precision.precision}, "
            f"crops in {'device memory' if train.residency == 'device' else train.residency}; writing {self.run}"
        )
        self.notes.of_run(about_cells(method, self.contract.panel, self._stained, self._unstained))
        stages = method.stages
        self.watch = self._watch()
        try:
            with self.interrupt.heard():
                for stage in stages[self.position.stage :]:
                    self._run_stage(stage)
            if not (stages[-1].monitored and best_path(self.run).exists()):
                self._save(best=True)  # nothing to choose by: the end
            self.fabric.barrier()  # no rank looks for `best` before it is written
            said = settle(method, val, self.config.batch_size, best_path(self.run), self.ema, self.fabric)
            self._save()
        finally:
            self.log.close()
        if said:
            self.log.say(said)
        self.log.say(f"trained: {self.run}")

    def _run_stage(self, stage: Stage) -> None:
        """Train one stage, from wherever it was left."""
        at, feed = self.position, self.feeds["train"]
        feed.whole = stage.whole
        self.method.start(stage)
        optimizers = self._optimizers(stage)
        self.log.stage(stage.name, stage.epochs * feed.steps, at.epoch * feed.steps + at.step)
        meter, saved = Meter(), time.monotonic()
        augment = self.augment if stage.augment else None
        while at.epoch < stage.epochs and not self._waited_enough(stage):
            due = stop = False
            parts = [feed.epoch(at.stage << 20 | at.epoch, at.step, augment)] * self.config.accumulate
            for batches in zip(*parts, strict=True):  # the same iterator so many times: one batch after the other
                self._step(batches, stage, optimizers, meter)
                at.step, at.total = at.step + 1, at.total + 1
                at_log = at.total % self.config.log_every == 0
                if at_log or self.fabric.world_size == 1:
                    due, stop = self._agree(time.monotonic() - saved >= 60 * self.config.checkpoint_minutes)
                if at_log or due or stop:
                    self._report(meter, stage)
                if stop or (due and at.step < feed.steps):
                    self._save(optimizers)
                    saved, due = time.monotonic(), False
                if stop:
                    raise KeyboardInterrupt
            self._report(meter, stage)
            self._last = meter.take_whole()  # of an epoch that was resumed, from there on: it only tells the user
            self._validate(stage)
            at.epoch, at.step = at.epoch + 1, 0
            if due:  # after the last step of an epoch only now, so that a resumed run does not validate again
                self._save(optimizers)
                saved = time.monotonic()
        at.stage, at.epoch, at.step = at.stage + 1, 0, 0
        self.position = Position(stage=at.stage, total=at.total)
        self._save()

    def _step(
        self, batches: Sequence[Batch], stage: Stage, optimizers: Mapping[str, Adam | None], meter: Meter
    ) -> None:
        """Let every player move once, by the mean gradient of all parts of the batch.

        A part is the same whoever computes it, from its random numbers to its batch statistics. No player has moved
        before all have seen the part: what the discriminator is shown, the generator made in its own turn.
        """
        at, steps = self.position, self.feeds["train"].steps
        self.method.progress = (at.epoch * steps + at.step) / (stage.epochs * steps)
        for mover in filter(None, optimizers.values()):
            mover.zero_grad(set_to_none=True)
        self.statistics.begin()
        for part, batch in enumerate(batches, self.fabric.global_rank * len(batches)):
            torch.manual_seed(mix("train", self.experiment.seed, at.stage, at.epoch, at.step, part))
            for player, optimizer in optimizers.items():
                self.method.turn(player)
                with self.fabric.autocast():
                    terms = self.method.loss(batch, player)
                if optimizer is not None and terms.count != 0:  # a gradient of 0 would let Adam move by its momentum
                    (terms.total / len(batches)).backward()
                meter.add(terms, "discriminator/" if player == "discriminator" else "")
            self._step_tables(stage)
            self.statistics.take()
        self.statistics.end()
        self._move(stage, optimizers)
        if self.ema:
            self.ema.update(at.epoch * steps + at.step)
        meter.step(sum(len(batch.index) for batch in batches) * self.fabric.world_size)

    def _step_tables(self, stage: Stage) -> None:
        world = self.fabric.world_size
        for table, lr in stage.tables:
            if world == 1:
                table.step(lr)
            else:
                table.step(lr, gather_rows, world)

    def _move(self, stage: Stage, optimizers: Mapping[str, Adam | None]) -> None:
        rate = min(1.0, (1 - self.method.progress) / stage.lr_decay) if stage.lr_decay else 1.0
        for player, optimizer in optimizers.items():
            if optimizer is None:
                continue
            for group, settings in zip(optimizer.param_groups, stage.groups[player], strict=True):
                group["lr"] = settings.lr * rate
            own = [p for group in optimizer.param_groups for p in group["params"]]
            average_gradients(own, self.fabric.world_size)
            if self.config.gradient_clip:
                torch.nn.utils.clip_grad_norm_(own, self.config.gradient_clip)
            optimizer.step()

    def _agree(self, due: bool) -> tuple[bool, bool]:
        """Say whether a checkpoint is due and whether to stop: rank 0 decides, for ranks must not differ."""
        answer = (due, self.interrupt.asked)
        return answer if self.fabric.world_size == 1 else self.fabric.broadcast(answer)

    def _report(self, meter: Meter, stage: Stage) -> None:
        """Log the mean of the last steps and stop where it is no longer a number or grows without bound."""
        if not meter.steps:
            return
        at = self.position
        steps, cells_per_s, values = meter.take(self.fabric)
        measure = values.pop(MEASURE, None)
        if not all(map(math.isfinite, values.values())):
            raise self._diverged("the loss is not a number")
        if measure is not None and stage.learns and at.diverges(measure, values, self.config.diverged):
            raise self._diverged(f"the loss grew to {measure:.3g}")
        self.log.record(at.total, at.epoch, stage.name, "train", values | {"cells_per_s": cells_per_s})
        shown = {k: v for k, v in values.items() if k.rpartition("/")[2] in SHOWN and not k.startswith("discr")}
        self.log.advance(steps, cells_per_s, "  ".join(f"{k} {v:.4f}" for k, v in list(shown.items())[:4]))

    def _diverged(self, what: str) -> Diverged:
        at, last, stages = self.position, last_path(self.run), self.method.stages
        kept = f"The checkpoint before that is kept: {last}." if last.exists() else "There was no checkpoint yet."
        rates = "Try a smaller learning rate (method.lr...), or train.precision=float32"
        stage = stages[min(at.stage, len(stages) - 1)]
        mend = rates if stage.learns else "It learns without steps: look for pixels that are no numbers in the images"
        return Diverged(f"{what} in stage {stage.name}, epoch {at.epoch}, step {at.total}. {kept} {mend}")

    @torch.no_grad()
    def _validate(self, stage: Stage) -> None:
        """Look at the held-out cells with the weights that predict; keep the best of them."""
        at, feed = self.position, self.feeds["val"]
        if (at.epoch + 1) % self.config.validate_every or not stage.validated:
            return
        self.method.eval()
        self.method.progress = (at.epoch + 1) / stage.epochs
        meter = Meter()
        with self.ema.in_place() if self.ema else nullcontext(), self.fabric.autocast():
            batches = feed.once(max(1, self.config.batch_size)) if len(feed) else ()
            for number, batch in enumerate(batches):
                place = number * self.fabric.world_size + self.fabric.global_rank
                torch.manual_seed(mix("validate", self.experiment.seed, at.stage, at.epoch, place))
                terms = self.method.validate(batch)
                weight = len(batch.index) if terms.count is None else terms.count
                if weight:
                    meter.add(terms, weight=weight)
            spread, picture = self.watch.look(self.method, at.total)
        self.method.start(stage)
        values = meter.take(self.fabric)[2]
        values.pop(MEASURE, None)
        if not all(map(math.isfinite, values.values())):
            raise self._diverged("the loss on held-out cells is not a number")
        self.log.record(at.total, at.epoch, stage.name, "val", values | spread)
        self.log.picture(picture, at.total)
        if self._last and self.method.progress > SETTLED:  # empty where the run went on after the epoch's last step
            signs = {sign.partition("(")[0]: sign for sign in self.method.signs(self._last)}
            self.notes.of_epoch(at.epoch, signs | collapsed(spread, self.watch.told))
        if stage.monitored and "loss" not in values:
            nothing = "no held-out cell can be judged, so nothing stops early and `best` is the end of the training"
            self.notes.of_epoch(at.epoch, {nothing: nothing})
        elif stage.monitored and values["loss"] < at.best:
            at.best, at.waited = values["loss"], 0
            self._save(best=True)
        else:
            at.waited += 1

    def _refuse_empty_parts(self, cells: int) -> None:
        parts, least = self.fabric.world_size * self.config.accumulate, min(self.config.batch_size, cells)
        if parts > least:
            raise InputError(
                f"train.accumulate: a batch of {least} cells cannot be cut in {parts} parts: raise train.batch_size, "
                "or lower accumulate or the number of processes"
            )

    def _watch(self) -> Watch:
        """Choose what is watched, the same in every run of the same split, and say what is not as one would expect."""
        panel = self.contract.panel
        sources = self.method.sources or (panel.chromatin_index,)
        cells, stand_in = find_cells(self.feeds["val"], self.feeds["train"], sources, panel)
        folder = samples_path(self.run) if self.fabric.is_global_zero else None
        watch = Watch(cells, sources, panel, folder, self.contract.pixel_size_um)
        if stand_in:
            few = f"fewer than two held-out cells show {', '.join(stand_in)}"
            self.notes.of_run([f"{few}: training cells are watched in their place"])
        self.notes.of_run(filter(None, [watch.blind]))
        return watch

    def _waited_enough(self, stage: Stage) -> bool:
        return stage.monitored and self.position.waited >= self.config.patience

    def _optimizers(self, stage: Stage) -> dict[str, Adam | None]:
        optimizers = {
            player: Adam([{"params": list(g.parameters), "lr": g.lr, "betas": g.betas} for g in groups])
            if groups
            else None
            for player, groups in stage.groups.items()
        }
        for player, state in self._resumed_optimizers.items():
            by_number = {int(k): v for k, v in state["state"].items()}
            optimizer = optimizers[player]
            assert optimizer is not None
            optimizer.load_state_dict({"state": by_number, "param_groups": state["param_groups"]})
            lay_out(optimizer)
        self._resumed_optimizers = {}
        return optimizers

    def _save(self, optimizers: Mapping[str, Adam | None] | None = None, *, best: bool = False) -> None:
        """Write `best` (weights alone) or `last` (everything); weights that are not finite end the training."""
        pools = [] if best else gather_states(pool_state(self.method), self.fabric)
        with self.ema.in_place() if self.ema and best else nullcontext():
            tree: dict[str, Any] = {"model": {k: v.clone() for k, v in self.method.state_dict().items()}}
        for name, value in tree["model"].items():
            if not value.isfinite().all():
                raise self._diverged(f"{name} of the model is not finite")
        if not self.fabric.is_global_zero:
            return
        tree["position"] = asdict(self.position)
        if not best:
            tree["tables"] = {name: table.state() for name, table in self.method.tables.items()}
            tree["optimizers"] = {player: _plain_state(o) for player, o in (optimizers or {}).items() if o}
            tree["ema"] = self.ema.values if self.ema else {}
            if pools:
                tree["pools"] = {str(rank): state for rank, state in enumerate(pools)}
        save(best_path(self.run) if best else last_path(self.run), tree, self.contract)

    def _saved(self, run: Path) -> dict[str, Any]:
        """Return what the last checkpoint holds, empty without one, refusing one of other data."""
        if not last_path(run).exists():
            return {}
        tree, contract = load(last_path(run))
        before, now = contract.to_dict(), self.contract.to_dict()
        broken = [term.replace("_", " ") for term in now if before[term] != now[term]]
        if broken:
            raise InputError(
                f"{self.experiment.data} is not what {run} was begun with: the {', '.join(broken)} differ(s). "
                "Begin a new run (--out)"
            )
        return tree

    def _take_up(self, tree: dict[str, Any]) -> None:
        pools = tree.get("pools", {})  # a rank that was not there before takes up the first one's, in the model
        own = pools.get(str(self.fabric.global_rank), {})
        self.method.load_state_dict(tree["model"] | own)
        for name, table in self.method.tables.items():
            table.load(tree["tables"][name])
        self._resumed_optimizers = tree["optimizers"]
        if self.ema:
            self.ema.load(tree["ema"])
        self.position = Position(**tree["position"])

    def _feed(self, store: CellStore, cells: Mapping[str, Any], part: str, measured: Any) -> Feed:
        channels, fabric = store.panel.indices(self.contract.panel.markers), self.fabric
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        size = sum(map(len, cells.values())), len(channels)
        residency = choose_residency(self.config.residency, store, *size, fabric.device, processes)
        return Feed(
            store, cells[part], channels, self.contract.normaliser, fabric.device, residency, self.config.batch_size,
            self.experiment.seed, fabric.global_rank, fabric.world_size, self.config.balance, measured[cells[part]],
            self.config.accumulate, self.config.steps_per_epoch,
        )  # fmt: skip


def _plain_state(optimizer: Adam) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {"state": {str(k): v for k, v in state["state"].items()}, "param_groups": state["param_groups"]}
