"""The training loop: one for all methods, exact on resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor
from torch.optim import Adam

from imgshared.build import build_augment, build_method, build_normaliser, build_panel, build_split
from imgshared.config import Experiment
from imgshared.data.feed import Feed, choose_residency, mix
from imgshared.data.store import CellStore
from imgshared.methods.base import Method, Stage
from imgshared.training.checkpoint import Contract, load, save
from imgshared.training.devices import average_gradients, gather_rows, make_fabric
from imgshared.training.folder import begin_run, best_path, last_path
from imgshared.training.log import RunLog
from imgshared.types import InputError, LossTerms


@dataclasses.dataclass
class Position:
    """How far a run is: everything that decides what the next step does, but the weights."""

    stage: int = 0
    epoch: int = 0
    step: int = 0  # of the epoch, done
    total: int = 0  # steps done in all
    best: float = math.inf
    waited: int = 0  # validations since the best
    smooth: float = math.nan  # exponential mean of the loss
    smooth_best: float = math.inf


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
        self.experiment, self.run, self.config = experiment, run, experiment.train
        store = CellStore(experiment.data)
        panel, split = build_panel(experiment, store), build_split(experiment, store)
        self.fabric = make_fabric(self.config.accelerator, self.config.precision)
        normaliser = build_normaliser(experiment, store, panel, split)
        self.contract = Contract(
            panel, store.crop_px, store.pixel_size_um, str(store.dtype), normaliser, split, store.data_hash
        )
        self.augment = build_augment(experiment.augment, experiment.method)
        torch.manual_seed(mix(experiment.seed))
        method = build_method(experiment.method, panel, store.crop_px)
        tree = self._saved(run) if resume else {}
        begin_run(experiment, run, resume, self.fabric)  # after all that may refuse the configuration
        if self.fabric.is_global_zero:
            (run / "contract.json").write_text(json.dumps(self.contract.to_dict(), indent=2) + "\n")
        parts = split.assign(store.obs)
        self.feeds = {part: self._feed(store, (parts == part).nonzero()[0]) for part in ("train", "val")}
        method.prepare(self.feeds["train"].measured, mix(experiment.seed, 1))
        self.method: Method = method.to(self.fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.position = Position()
        self._resumed_optimizers: dict[str, Any] = {}
        if tree:
            self._take_up(tree)
        self.log = RunLog(run, self.position.total, active=self.fabric.is_global_zero, console=console)
        self._stop_asked = False

    def fit(self) -> None:
        """Run the remaining stages."""
        train, val = self.feeds["train"], self.feeds["val"]
        self.log.say(
            f"[bold]{self.experiment.method.name}[/] on {len(train):,} cells ({len(val):,} held out to stop early), "
            f"{', '.join(self.contract.panel.markers)}; {self.fabric.device}, {self.fabric._precision.precision}, "
            f"crops in {'device memory' if train.residency == 'device' else train.residency}; writing {self.run}"
        )
        stages = self.method.stages
        try:
            with self._on_interrupt():
                for stage in stages[self.position.stage :]:
                    self._run_stage(stage)
            if not best_path(self.run).exists():
                self._save(best=True)
            self._save()
        finally:
            self.log.close()
        self.fabric.barrier()  # no rank looks for `best` before it is written
        self.log.say(f"done: {self.run}")

    def _run_stage(self, stage: Stage) -> None:
        """Train one stage, from wherever it was left."""
        at, feed = self.position, self.feeds["train"]
        self.method.start(stage)
        optimizers = self._optimizers(stage)
        self.log.stage(stage.name, stage.epochs * feed.steps, at.epoch * feed.steps + at.step)
        meter, saved = Meter(), time.monotonic()
        augment = self.augment if stage.augment else None
        while at.epoch < stage.epochs and not self._waited_enough(stage):
            due = stop = False
            for batch in feed.epoch(at.stage << 20 | at.epoch, at.step, augment):
                torch.manual_seed(mix(self.experiment.seed, at.stage, at.epoch, at.step, self.fabric.global_rank))
                for player, optimizer in optimizers.items():
                    with self.fabric.autocast():
                        terms = self.method.loss(batch, player)
                    optimizer.zero_grad(set_to_none=True)
                    terms.total.backward()
                    average_gradients(self.method.parameters(), self.fabric.world_size)
                    optimizer.step()
                    meter.add(terms, len(batch.index) * self.fabric.world_size)
                self._step_tables(stage)
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
            self._validate(stage)
            at.epoch, at.step = at.epoch + 1, 0
            if due:  # after the last step of an epoch only now, so that a resumed run does not validate again
                self._save(optimizers)
                saved = time.monotonic()
        at.stage, at.epoch, at.step = at.stage + 1, 0, 0
        at.best, at.waited, at.smooth, at.smooth_best = math.inf, 0, math.nan, math.inf
        self._save()

    def _step_tables(self, stage: Stage) -> None:
        world = self.fabric.world_size
        for table, lr in stage.tables:
            if world == 1:
                table.step(lr)
            else:
                table.step(lr, gather_rows, world)

    def _agree(self, due: bool) -> tuple[bool, bool]:
        """Say whether a checkpoint is due and whether to stop: rank 0 decides, for ranks must not differ."""
        answer = (due, self._stop_asked)
        return answer if self.fabric.world_size == 1 else self.fabric.broadcast(answer)

    def _report(self, meter: Meter, stage: Stage) -> None:
        """Log the mean of the last steps and stop where it is no longer a number or grows without bound."""
        if not meter.steps:
            return
        at = self.position
        steps, cells_per_s, values = meter.take(self.fabric)
        loss = values["loss"]
        at.smooth = loss if math.isnan(at.smooth) else 0.9 * at.smooth + 0.1 * loss
        if not math.isfinite(loss) or at.smooth > self.config.diverged * max(at.smooth_best, 1e-8):
            what = f"grew to {loss:.3g}" if math.isfinite(loss) else "is not a number"
            raise Diverged(
                f"the loss {what} in stage {stage.name}, epoch {at.epoch}, step {at.total}. "
                f"The last good checkpoint is kept in {self.run}. "
                "Try a smaller learning rate (method.lr_...), or train.precision=float32"
            )
        at.smooth_best = min(at.smooth_best, at.smooth)
        self.log.record(at.total, at.epoch, stage.name, "train", values | {"cells_per_s": cells_per_s})
        shown = {k: v for k, v in values.items() if k == "loss" or k.endswith(("full", "shared", "z_shared"))}
        self.log.advance(steps, cells_per_s, "  ".join(f"{k} {v:.4f}" for k, v in list(shown.items())[:4]))

    @torch.no_grad()
    def _validate(self, stage: Stage) -> None:
        """Measure the held-out loss, keep the best weights."""
        at, feed = self.position, self.feeds["val"]
        if not stage.monitored or not len(feed) or (at.epoch + 1) % self.config.validate_every:
            return
        self._same_buffers()
        self.method.eval()
        meter = Meter()
        for batch in feed.once(max(1, self.config.batch_size)):
            with self.fabric.autocast():
                meter.add(self.method.validate(batch), len(batch.index), weight=len(batch.index))
        self.method.start(stage)
        _, _, values = meter.take(self.fabric)
        self.log.record(at.total, at.epoch, stage.name, "val", values)
        if values["loss"] < at.best:
            at.best, at.waited = values["loss"], 0
            self._save(best=True)
        else:
            at.waited += 1

    def _waited_enough(self, stage: Stage) -> bool:
        return stage.monitored and self.position.waited >= self.config.patience

    def _optimizers(self, stage: Stage) -> dict[str, Adam]:
        optimizers = {
            player: Adam([{"params": list(g.parameters), "lr": g.lr} for g in groups])
            for player, groups in stage.groups.items()
        }
        for player, state in self._resumed_optimizers.items():
            by_number = {int(k): v for k, v in state["state"].items()}
            optimizers[player].load_state_dict({"state": by_number, "param_groups": state["param_groups"]})
        self._resumed_optimizers = {}
        return optimizers

    def _save(self, optimizers: Mapping[str, Adam] | None = None, *, best: bool = False) -> None:
        """Write `best` (weights alone) or `last` (everything), unless the weights are not finite."""
        if not self.fabric.is_global_zero:
            return
        tree: dict[str, Any] = {"model": self.method.state_dict()}
        if not all(bool(v.isfinite().all()) for v in tree["model"].values()):
            return
        tree["position"] = dataclasses.asdict(self.position)
        if not best:
            tree["tables"] = {name: table.state() for name, table in self.method.tables.items()}
            tree["optimizers"] = {player: _plain_state(o) for player, o in (optimizers or {}).items()}
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
        self.method.load_state_dict(tree["model"])
        for name, table in self.method.tables.items():
            table.load(tree["tables"][name])
        self._resumed_optimizers = tree["optimizers"]
        self.position = Position(**tree["position"])

    def _feed(self, store: CellStore, cells: Any) -> Feed:
        channels, fabric = store.panel.indices(self.contract.panel.markers), self.fabric
        wish = self.config.residency
        here = len(cells) * fabric.world_size  # every rank of this host holds them
        residency = choose_residency(wish, store, here, len(channels), fabric.device)
        if residency == "device" and self.augment.geometry:
            residency = "memory"  # albumentations works on the host
        return Feed(
            store, cells, channels, self.contract.normaliser, fabric.device, residency, self.config.batch_size,
            self.experiment.seed, fabric.global_rank, fabric.world_size,
        )  # fmt: skip

    def _same_buffers(self) -> None:
        """Batch statistics are per rank: take those of rank 0."""
        if self.fabric.world_size > 1:
            for buffer in self.method.buffers():
                torch.distributed.broadcast(buffer, 0)

    @contextmanager
    def _on_interrupt(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the current step, with a checkpoint."""

        def ask(*_: object) -> None:
            if self._stop_asked:  # asked twice: at once
                raise KeyboardInterrupt
            self._stop_asked = True

        try:
            before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the caller handles signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Meter:
    """Sums losses on the device, so that a step does not wait for a number."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.steps, self._cells, self._since = 0, 0, time.monotonic()
        self._sums: dict[str, tuple[Tensor, float]] = {}  # sum and its weight: a batch may lack a term

    def add(self, terms: LossTerms, cells: int, weight: float = 1.0) -> None:
        """Add a step's terms."""
        for name, value in {"loss": terms.total.detach(), **terms.parts}.items():
            total, weights = self._sums.get(name, (torch.zeros_like(value), 0.0))
            self._sums[name] = (total + value.float() * weight, weights + weight)
        self.steps, self._cells = self.steps + 1, self._cells + cells

    def take(self, fabric: Fabric) -> tuple[int, float, dict[str, float]]:
        """Return steps, cells a second and the means over all ranks, and begin anew."""
        values = torch.stack([total for total, _ in self._sums.values()]).tolist() if self._sums else []
        weights = [weight for _, weight in self._sums.values()]
        parts = [dict(zip(self._sums, zip(values, weights, strict=True), strict=True))]
        if fabric.world_size > 1:  # ranks may hold other terms, or no cells at all
            parts *= fabric.world_size
            torch.distributed.all_gather_object(parts, parts[0])
        names = dict.fromkeys(name for part in parts for name in part)
        means = {n: sum(p[n][0] for p in parts if n in p) / sum(p[n][1] for p in parts if n in p) for n in names}
        rate = self._cells / max(time.monotonic() - self._since, 1e-9)
        steps = self.steps
        self.clear()
        return steps, rate, means


def _plain_state(optimizer: Adam) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {"state": {str(k): v for k, v in state["state"].items()}, "param_groups": state["param_groups"]}
