"""Small timm networks as classifiers of crops, trained from scratch: one after another, or many together.

Together, the weights of all networks lie along a leading axis (`torch.vmap`), so that a step of a study's every fold,
marker and input is one step of the device. All networks start from the same weights and see the same moves of their
crops, so that they differ by what they are given alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from imgshared.data.panel import nearest
from imgshared.evaluation.jobs import Cells, Job, Probabilities
from imgshared.evaluation.labels import inner_groups
from imgshared.training.devices import has_bf16
from imgshared.types import InputError

BATCH = 64
LEARNING_RATE = 2e-3
ROUNDS = 15  # times that the inner groups are looked at
PATIENCE = 5  # of them, without a gain, end a training
TOGETHER = {"cuda": 32, "cpu": 4}  # networks a step; more gain nothing
BLOCK = 256  # crops at a time where nothing is learnt

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """How each network is trained.

    Parameters
    ----------
    model
        Any timm model; its batch normalisation becomes group normalisation, which no other cell moves.
    steps
        Batches of 64 crops, at most: the same for every network, however many cells it is given.
    """

    model: str
    steps: int
    seed: int

    @property
    def rounds(self) -> list[range]:
        """The steps between two looks at the inner groups."""
        ends = np.linspace(0, self.steps, min(ROUNDS, self.steps) + 1).astype(int)
        return [range(a, b) for a, b in itertools.pairwise(ends)]


def fit_networks(
    jobs: Sequence[Job],
    training: Training,
    together: int | None = None,
    done: Callable[[int, list[Probabilities]], None] = lambda job, answers: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[list[Probabilities]]:
    """Train a network a job and return the class probabilities of its tests, (m, classes) each, rows sum to one.

    AdamW under a one-cycle schedule, cross-entropy with balanced classes, random mirror images, rotations and scales.
    Brightness is scaled by the cells learnt from. About a fifth of these, whole groups, are kept aside: the weights of
    least loss on them are kept, and a network that no longer gains stops by itself. Where no groups can be kept aside
    without losing a class, the training runs to its end.

    Parameters
    ----------
    jobs
        Of crops; those with as many channels and classes are trained together.
    together
        Networks a step; None: both forms are timed, and the faster one is taken.
    done
        Told of every network that is ready, with its answers.
    say
        Told what will take how long.

    Raises
    ------
    InputError
        Where timm knows no such model.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, job in enumerate(jobs):
        alike.setdefault((*job.learn.take(slice(1)).shape[1:], job.classes), []).append(i)
    answers: list[list[Probabilities]] = [[] for _ in jobs]
    left = len(jobs)
    for (channels, *_, classes), members in alike.items():
        network = build(training, channels, classes)
        size = together or _faster(network, [jobs[i] for i in members], training, left, say)
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            stack = _Stack(network, [jobs[i] for i in batch], training)
            stack.train()
            for i, found in zip(batch, stack.answers(), strict=True):
                answers[i] = found
                done(i, found)
        left -= len(members)
    return answers


def paces(network: nn.Module, jobs: Sequence[Job], training: Training, steps: int = 2) -> dict[int, float]:
    """Time a few steps of one network and of many together: crops a second, by networks a step."""
    found = {}
    for count in sorted({1, min(len(jobs), TOGETHER[_device().type])}):
        stack = _Stack(network, jobs[:count], training)
        stack.step(0)  # the first one also chooses kernels
        _wait()
        began = time.perf_counter()
        for step in range(1, steps + 1):
            stack.step(step % training.steps)
        _wait()
        found[count] = steps * count * BATCH / (time.perf_counter() - began)
    return found


def _faster(network: nn.Module, jobs: Sequence[Job], training: Training, left: int, say: Callable[[str], None]) -> int:
    """Return how many networks to train together, and say how long all that are left will take at most."""
    try:
        found = paces(network, jobs, training)
    except RuntimeError:  # a network that vmap cannot take, or too little memory
        found = paces(network, jobs[:1], training)
    best = max(found, key=lambda count: found[count])
    inner = sum(int(kept.sum()) for kept in (_inner(job, training.seed) for job in jobs)) / len(jobs)
    crops = training.steps * BATCH + len(training.rounds) * inner / 3  # looking costs a third of learning
    form = "one by one" if best == 1 else f"{best} together"
    hours = left * crops / found[best] / 3600
    length = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours > 1 / 60 else "a minute"
    say(f"{left} networks {form}, {found[best]:,.0f} cells/s on {_device().type}: at most {length}")
    return best


def build(training: Training, channels: int, classes: int) -> nn.Module:
    """Return the network that every job of so many channels and classes starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        refuse_unknown(training.model)
        network: nn.Module = timm.create_model(training.model, pretrained=False, in_chans=channels, num_classes=classes)
    return _by_groups(network).to(_device())


def refuse_unknown(model: str) -> None:
    """Refuse a network that timm does not know.

    Raises
    ------
    InputError
        Names the nearest one.
    """
    if not timm.is_model(model):
        raise InputError(f"cnn: timm knows no model {model!r}.{nearest(model, timm.list_models())}")


class _Stack:
    """Networks alike but for their weights, which lie along a leading axis, and their cells."""

    def __init__(self, network: nn.Module, jobs: Sequence[Job], training: Training) -> None:
        self.network, self.jobs, self.training = network, list(jobs), training
        self.device = _device()
        self.scales = [_scale(job) for job in jobs]
        inner = [_inner(job, training.seed) for job in jobs]
        self.inner = [np.flatnonzero(kept) for kept in inner]
        self.rows = [_stream(np.flatnonzero(~kept), training) for kept in inner]
        balance = [len(j.truth) / (j.classes * np.maximum(np.bincount(j.truth, minlength=j.classes), 1)) for j in jobs]
        self.balance = torch.as_tensor(np.stack(balance), dtype=torch.float32, device=self.device)
        start = {name: p.detach() for name, p in network.named_parameters()}
        self.weights: Weights = {
            name: p.expand(len(jobs), *p.shape).clone().requires_grad_() for name, p in start.items()
        }
        self.best = [{name: p.detach()[k] for name, p in self.weights.items()} for k in range(len(jobs))]
        self.active = list(range(len(jobs)))
        self.optimiser = torch.optim.AdamW(self.weights.values(), lr=LEARNING_RATE, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, LEARNING_RATE, total_steps=training.steps + 1
        )

    def train(self) -> None:
        """Train until the budget is spent or no network gains any more; `best` holds the weights to use."""
        least = np.full(len(self.jobs), np.inf)
        since = np.zeros(len(self.jobs), int)
        with torch.random.fork_rng(devices=[]):  # some networks draw; the caller's stream is left alone
            torch.manual_seed(self.training.seed)
            for steps in self.training.rounds:
                for step in steps:
                    self.step(step)
                for place, k in enumerate(self.active):
                    loss = self._inner_loss(place, k) if len(self.inner[k]) else -float(steps.stop)
                    since[k] += 1
                    if loss < least[k]:
                        least[k], since[k] = loss, 0
                        self.best[k] = {name: p.detach()[place].clone() for name, p in self.weights.items()}
                going = [place for place, k in enumerate(self.active) if since[k] < PATIENCE]
                if not going:
                    return
                if len(going) < len(self.active):
                    self._keep(going)

    def step(self, step: int) -> None:
        """Learn from the next batch of every network."""
        self.network.train()
        rows = [self.rows[k][step] for k in self.active]
        images = torch.stack([self._load(k, at) for k, at in zip(self.active, rows, strict=True)])
        images = _move(images, np.random.default_rng((self.training.seed, step)))
        truth = np.stack([self.jobs[k].truth[at] for k, at in zip(self.active, rows, strict=True)])
        loss = self._loss(self.weights, images, truth, self.active).sum()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()

    def answers(self) -> list[list[Probabilities]]:
        """Class probabilities of each job's tests, by its best weights."""
        self.network.eval()
        found = []
        with torch.inference_mode():
            for k, job in enumerate(self.jobs):
                logits = [
                    torch.cat(
                        [self._logits(self._one(k), self._load(k, at, view)[None])[0].cpu() for at in _blocks(view)]
                    )
                    for view in job.tests
                ]
                found.append([given.double().softmax(1).numpy() for given in logits])
        return found

    def _inner_loss(self, place: int, k: int) -> float:
        self.network.eval()
        weights = {name: p.detach()[place : place + 1] for name, p in self.weights.items()}
        total = 0.0
        with torch.inference_mode():
            for at in np.array_split(self.inner[k], -(-len(self.inner[k]) // BLOCK)):
                loss = self._loss(weights, self._load(k, at)[None], self.jobs[k].truth[at][None], [k])
                total += float(loss) * len(at)
        return total / len(self.inner[k])

    def _loss(self, weights: Weights, images: Tensor, truth: Cells, whose: list[int]) -> Tensor:
        """(J,) cross-entropy with balanced classes."""
        logits = self._logits(weights, images)
        target = torch.as_tensor(truth, dtype=torch.int64, device=self.device)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        return (loss * self.balance[whose].gather(1, target)).mean(1)

    def _logits(self, weights: Weights, images: Tensor) -> Tensor:
        """(J, n, classes) float32 of (J, n, K, Y, X)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device.type)):
            if len(images) == 1:
                one = images[0].contiguous(memory_format=torch.channels_last)
                return self._forward({name: p[0] for name, p in weights.items()}, one)[None].float()
            return torch.vmap(self._forward, randomness="different")(weights, images).float()

    def _forward(self, weights: Weights, images: Tensor) -> Tensor:
        found: Tensor = functional_call(self.network, weights, (images,))
        return found

    def _one(self, k: int) -> Weights:
        return {name: p[None] for name, p in self.best[k].items()}

    def _load(self, k: int, rows: Any, view: Any = None) -> Tensor:
        centre, scale = self.scales[k]
        images = (view or self.jobs[k].learn).take(rows)
        return torch.as_tensor((images - centre) / scale, dtype=torch.float32, device=self.device)

    def _keep(self, places: list[int]) -> None:
        """Go on with some of the networks: their weights and what the optimiser knows of them."""
        kept: Weights = {}
        group = self.optimiser.param_groups[0]
        for name, old in self.weights.items():
            known = self.optimiser.state.pop(old)
            kept[name] = old.detach()[places].clone().requires_grad_()
            self.optimiser.state[kept[name]] = {
                key: value[places] if value.shape == old.shape else value for key, value in known.items()
            }
        self.weights, group["params"] = kept, list(kept.values())
        self.active = [self.active[place] for place in places]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _by_groups(network: nn.Module) -> nn.Module:
    """Put group normalisation in place of batch normalisation, whose running statistics no two networks could share."""
    for name, part in network.named_children():
        if not isinstance(part, nn.BatchNorm2d):
            _by_groups(part)
            continue
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if part.num_features % g == 0 and part.num_features >= 2 * g)
        new: nn.Module = nn.GroupNorm(groups, part.num_features)
        if isinstance(part, BatchNormAct2d):
            new = nn.Sequential(new, part.drop, part.act)
        setattr(network, name, new)
    return network


def _inner(job: Job, seed: int) -> NDArray[np.bool_]:
    kept = inner_groups(job.truth, job.groups, seed)
    return np.zeros(len(job.truth), bool) if kept is None else kept


def _scale(job: Job) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of each channel, (K, 1, 1)."""
    sums = np.zeros((2, *job.learn.take(slice(1)).shape[1:2]))
    pixels = 0
    for at in _blocks(job.learn):
        x = job.learn.take(at).astype(np.float64)
        sums += x.sum((0, 2, 3)), (x**2).sum((0, 2, 3))
        pixels += x[:, 0].size
    mean = sums[0] / pixels
    deviation = np.sqrt(np.maximum(sums[1] / pixels - mean**2, 1e-12))
    return mean[:, None, None].astype(np.float32), deviation[:, None, None].astype(np.float32)


def _stream(rows: Cells, training: Training) -> Cells:
    """(steps, BATCH) rows: every cell once before any comes again."""
    rng = np.random.default_rng(training.seed)
    wanted = training.steps * BATCH
    orders = [rng.permutation(rows) for _ in range(-(-wanted // len(rows)))]
    return np.concatenate(orders)[:wanted].reshape(training.steps, BATCH)


def _blocks(view: Any) -> list[slice]:
    return [slice(i, i + BLOCK) for i in range(0, len(view), BLOCK)]


def _move(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirror, rotate by any angle and scale by up to a tenth, each crop by itself, all networks' crops alike."""
    networks, n, channels, height, width = images.shape
    angle, scale = rng.uniform(0, 2 * np.pi, n), rng.uniform(0.9, 1.1, n)
    mirror = rng.choice([-1.0, 1.0], n)
    theta = np.zeros((n, 2, 3))
    theta[:, 0, :2] = np.stack([np.cos(angle) * mirror, -np.sin(angle)], 1) / scale[:, None]
    theta[:, 1, :2] = np.stack([np.sin(angle) * mirror, np.cos(angle)], 1) / scale[:, None]
    beside = images.transpose(0, 1).reshape(n, networks * channels, height, width)
    grid = F.affine_grid(torch.as_tensor(theta, dtype=images.dtype, device=images.device), list(beside.shape), False)
    moved = F.grid_sample(beside, grid, padding_mode="reflection", align_corners=False)
    return moved.view(n, networks, channels, height, width).transpose(0, 1)
