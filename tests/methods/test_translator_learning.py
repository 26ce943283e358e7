"""That the translator learns: from pairs, from a partner, without pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imgshared.config import Experiment, TranslatorConfig, load
from imgshared.data.panel import Panel
from imgshared.methods.translator import Translator
from imgshared.metrics import pearson
from imgshared.types import Batch

CONFIGS = Path(__file__).parents[2] / "configs"
DNA = 1

Make = Callable[..., tuple[Translator, Batch]]


def learn(method: Translator, batch: Batch, steps: int, size: int = 32, lr: float = 4e-3) -> list[dict[str, float]]:
    """The loop in short."""
    stage = method.stages[0]
    method.start(stage)
    optimizers = {
        p: torch.optim.Adam([x for g in groups for x in g.parameters], lr) for p, groups in stage.groups.items()
    }
    log = []
    for _ in range(steps):
        rows = torch.randperm(len(batch.index))[:size]
        part = Batch(batch.index[rows], batch.images[rows], batch.measured[rows])
        log.append({})
        for player, optimizer in optimizers.items():
            method.turn(player)
            terms = method.loss(part, player)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            log[-1] |= {f"{player}/{name}": value.item() for name, value in terms.parts.items()}
    method.eval()
    return log


def test_it_learns_from_cells_that_were_never_stained_together(make_translator: Make, never_together: Tensor) -> None:
    weights = {"weights": {"full": 1.0, "patch_nce": 0.1, "adversarial": 0.1, "cycle": 1.0, "identity": 1.0, "r1": 0.1}}
    method, batch = make_translator(weights, measured=never_together, seed=1)  # a start far off
    assert not method.stages[0].monitored
    log = learn(method, batch, 40, size=16, lr=6e-3)
    assert all(set(step) == set(log[0]) for step in log)
    assert {"generator/adversarial", "generator/patch_nce", "discriminator/r1"} < set(log[0])
    for name in ("full", "cycle", "identity", "patch_nce"):
        first, last = (sum(step[f"generator/{name}"] for step in part) for part in (log[:5], log[-5:]))
        assert last < (1.0 if name == "patch_nce" else 0.7) * first, name
    assert set(method.validate(batch).parts) == {"full"}
    for source in (0, DNA):
        rows = never_together[:, source]
        predicted = method.translate(batch.images[rows], never_together[rows], [1 - source]).mean
        assert predicted.isfinite().all()


def toy(n: int, seed: int) -> Tensor:
    """DNA: a few blobs; P0: half of its blur and bright spots at random places; P2: a copy of P0."""
    g = torch.Generator().manual_seed(seed)

    def spots(count: int, width: float) -> Tensor:
        y, x = (torch.rand(n, count, 1, 1, generator=g) * 12 + 2 for _ in range(2))
        at = torch.arange(16.0)
        return torch.exp(-((at[:, None] - y) ** 2 + (at - x) ** 2) / (2 * width**2)).sum(1)

    dna = spots(3, 1.5).clamp_max(1)
    blur = F.avg_pool2d(dna[:, None], 3, 1, 1)[:, 0]
    protein = 0.5 * blur + 0.8 * spots(1, 1.0)
    return torch.stack([protein, dna, protein], 1)


@pytest.mark.parametrize("seed", [2, 3])  # from starts of each stain's own these came to draw the negative
def test_it_draws_a_stain_where_it_belongs_without_a_cell_that_shows_both(seed: int) -> None:
    torch.manual_seed(seed)
    unpaired = load(Experiment, CONFIGS / "translator_unpaired.yaml").method
    small = {"channels": (12, 16), "marker_dim": 4, "discriminator_channels": (8, 16)}
    method = Translator(replace(unpaired, **small), panel=Panel(("P0", "DNA"), "DNA"), crop_px=16)
    measured = torch.eye(2, dtype=torch.bool).repeat_interleave(128, 0)
    method.prepare(measured, 0)
    seen = torch.where(measured[..., None, None], toy(256, 0)[:, :2], torch.nan)
    learn(method, Batch(torch.arange(256), seen, measured), 100, size=16, lr=3e-3)
    test = toy(100, 1)[:, :2]
    with torch.no_grad():
        drawn = method.translate(test, torch.eye(2, dtype=torch.bool)[[DNA] * 100], [0]).mean[:, 0]
    own, other = (pearson(test[:, 0].numpy(), guess.numpy()).mean() for guess in (drawn, drawn.roll(1, 0)))
    assert own > 0.6
    assert other < 0.3


def taught(measured: Tensor, **settings: Any) -> tuple[Translator, Tensor]:
    """A translator that learnt from toy cells of these stains, and the mean of what they are in truth."""
    torch.manual_seed(0)
    method = Translator(
        TranslatorConfig(channels=(12, 16), marker_dim=4, **settings),
        panel=Panel(("P0", "DNA", "P2"), "DNA"),
        crop_px=16,
    )
    train = toy(len(measured), 0)
    method.prepare(measured, 0)
    seen = torch.where(measured[..., None, None], train, torch.nan)
    learn(method, Batch(torch.arange(len(measured)), seen, measured), 150, lr=6e-3)
    return method, train.mean(0)


def error_of(method: Translator, test: Tensor, target: int, *sources: int) -> float:
    """Mean squared error of a stain predicted from others."""
    given = torch.zeros(test.shape[:2], dtype=torch.bool)
    given[:, list(sources)] = True
    with torch.no_grad():
        return (method.translate(test, given, [target]).mean - test[:, target, None]).square().mean().item()


@pytest.mark.parametrize("settings", [{}, {"fusion": "product", "encoders": "marker"}])
def test_it_predicts_what_can_be_known_and_more_from_an_informative_partner(settings: dict[str, str]) -> None:
    method, means = taught(torch.ones(256, 3, dtype=torch.bool), **settings)
    test = toy(100, 1)
    error = partial(error_of, method, test, 2)
    picture = (means[2] - test[:, 2]).square().mean().item()
    spots = test[:, 2] - 0.5 * F.avg_pool2d(test[:, DNA, None], 3, 1, 1)[:, 0]
    unknowable = spots.var(0).mean().item()  # from DNA
    assert 0.9 * unknowable < error(DNA) < 0.6 * picture
    assert error(DNA) < unknowable + 0.25 * (picture - unknowable)
    assert error(DNA, 0) < 0.7 * error(DNA)
    assert error(0) < 0.4 * error(DNA)
    z = method.encode(test, torch.ones(100, 3, dtype=torch.bool))
    assert torch.equal(z.shared, method.network.pool(method._fused(test, z.measured)[1].shared, (16, 16)))


def test_two_panels_that_share_no_protein_complete_each_other() -> None:
    measured = torch.ones(256, 3, dtype=torch.bool)
    measured[:128, 2] = measured[128:, 0] = False
    method, means = taught(measured)
    test = toy(100, 1)
    for own, other in ((0, 2), (2, 0)):
        picture = (means[other] - test[:, other]).square().mean().item()
        assert error_of(method, test, other, DNA) < 0.6 * picture
        # What the other panel shows beside DNA was never seen with this stain: it may help, it must not harm.
        assert error_of(method, test, other, DNA, own) < 1.05 * error_of(method, test, other, DNA)
