"""pix2pix: what each player minimises and moves, what the discriminator sees, what a prediction may know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgshared.build import build_method
from imgshared.config import Pix2pixConfig
from imgshared.data.panel import Panel
from imgshared.methods.pix2pix import Pix2pix
from imgshared.types import Batch, InputError

PANEL = Panel(("P0", "DNA", "P2", "P3"), "DNA")
SMALL = Pix2pixConfig(channels=(4, 6, 8), discriminator_channels=(4, 6), dropout=0.0, epochs=2)
PLAYERS = ("generator", "discriminator")


def make(panel: Panel = PANEL, **changes: Any) -> tuple[Pix2pix, Batch]:
    torch.manual_seed(0)
    method = build_method(replace(SMALL, **changes), panel, 16)
    assert isinstance(method, Pix2pix)
    n = len(panel)
    measured = torch.rand(10, n) < 0.6
    measured[:, 1] = torch.arange(10) % 5 > 0
    batch = Batch(torch.arange(10), torch.rand(10, n, 16, 16) * measured[..., None, None], measured)
    method.prepare(measured, seed=0)
    method.start(method.stages[0])
    return method, batch


def play(method: Pix2pix, batch: Batch, steps: int) -> list[dict[str, float]]:
    groups = method.stages[0].groups
    optimizers = {p: torch.optim.Adam(g[0].parameters, lr=g[0].lr, betas=g[0].betas) for p, g in groups.items()}
    log = []
    for _ in range(steps):
        log.append({})
        for player, optimizer in optimizers.items():
            method.turn(player)
            terms = method.loss(batch, player)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            log[-1] |= {f"{player}/{name}": value.item() for name, value in terms.parts.items()}
    return log


def seen_by_the_discriminator(method: Pix2pix, batch: Batch, player: str) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Record (images, markers, logits) of every call in a player's turn."""
    calls: list[tuple[Tensor, Tensor | None, Tensor]] = []
    handle = method.discriminator.register_forward_hook(lambda m, i, o: calls.append((*i, o)))
    method.turn(player)
    method.loss(batch, player)
    handle.remove()
    return calls


def expected_pairs(batch: Batch) -> list[tuple[int, int]]:
    return [(i, c) for i in range(10) for c in (0, 2, 3) if batch.measured[i, 1] and batch.measured[i, c]]


def test_the_discriminator_sees_each_measured_stain_beside_its_cells_chromatin() -> None:
    method, batch = make()
    i, c = (torch.tensor(v) for v in zip(*expected_pairs(batch), strict=True))
    ((fake, markers, _),) = seen_by_the_discriminator(method, batch, "generator")
    real, judged = seen_by_the_discriminator(method, batch, "discriminator")
    assert torch.equal(real[0], torch.stack([batch.images[i, 1], batch.images[i, c]], 1))
    for images, named, _ in (real, judged):
        assert torch.equal(images[:, 0], batch.images[i, 1])
        assert named is not None
        assert torch.equal(named, c)
    assert markers is not None
    assert torch.equal(markers, c)
    assert torch.equal(judged[0], fake)  # the translations that the generator made in its turn
    assert not judged[0].requires_grad
    whole = batch.measured[:, 1] & batch.measured[:, [0, 2, 3]].any(1)
    made = method.generator(batch.images[whole, 1:2])
    row = whole.cumsum(0) - 1
    target = torch.tensor([0, -1, 1, 2])
    torch.testing.assert_close(fake[:, 1], made[row[i], target[c]])


@pytest.mark.parametrize("kind", ["bce", "lsgan", "hinge"])
def test_each_player_minimises_the_papers_terms(kind: str) -> None:
    method, batch = make(adversarial=kind, l1_weight=7.0)
    method.turn("generator")
    calls: list[tuple[Tensor, Tensor]] = []
    method.discriminator.register_forward_hook(lambda m, i, o: calls.append((i[0], o)))
    generator = method.loss(batch, "generator")
    method.turn("discriminator")
    discriminator = method.loss(batch, "discriminator")
    (fake, on_fake), (real, on_real), (_, on_old) = calls
    ones, zeros = torch.ones_like(on_real), torch.zeros_like(on_real)
    want = {
        "bce": (
            F.binary_cross_entropy_with_logits(on_fake, ones),
            (F.binary_cross_entropy_with_logits(on_real, ones) + F.binary_cross_entropy_with_logits(on_old, zeros)) / 2,
        ),
        "lsgan": (F.mse_loss(on_fake, ones), (F.mse_loss(on_real, ones) + F.mse_loss(on_old, zeros)) / 2),
        "hinge": (-on_fake.mean(), F.relu(1 - on_real).mean() + F.relu(1 + on_old).mean()),
    }[kind]
    l1 = 7 * (fake[:, 1] - real[:, 1]).abs().mean()
    assert generator.total.item() == pytest.approx((want[0] + l1).item(), rel=1e-5)
    assert generator.parts["l1"].item() == pytest.approx(l1.item(), rel=1e-5)
    assert discriminator.total.item() == pytest.approx(want[1].item(), rel=1e-5)
    middle = 0.5 if kind == "lsgan" else 0.0
    right = ((on_real > middle).float().mean() + (on_old < middle).float().mean()) / 2
    assert discriminator.parts["accuracy"].item() == pytest.approx(right.item())
    assert set(discriminator.parts) == {"adversarial", "accuracy"}


def test_r1_is_the_slope_in_the_real_stain_of_a_pair() -> None:
    method, batch = make(r1_weight=3.0)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in method.discriminator.modules())
    method.turn("discriminator")
    terms = method.loss(batch, "discriminator")
    i, c = (torch.tensor(v) for v in zip(*expected_pairs(batch), strict=True))
    squares = []
    for cell, channel in zip(i, c, strict=True):
        stain = batch.images[cell, channel][None, None].clone().requires_grad_()
        pair = torch.cat([batch.images[cell, 1][None, None], stain], 1)
        (slope,) = torch.autograd.grad(method.discriminator(pair, channel[None]).sum(), stain)
        squares.append(slope.square().sum())
    assert terms.parts["r1"].item() == pytest.approx(3 * 0.5 * torch.stack(squares).mean().item(), rel=1e-4)
    assert terms.total.item() == pytest.approx((terms.parts["r1"] + terms.parts["adversarial"]).item(), rel=1e-5)
    terms.total.backward()  # a gradient of a gradient


def test_each_turn_moves_its_own_network_alone() -> None:
    method, batch = make()
    groups = method.stages[0].groups
    assert list(groups) == ["generator", "discriminator"]
    for player in PLAYERS:
        before = {k: v.clone() for k, v in method.named_parameters()}
        (group,) = groups[player]
        assert group.betas == (0.5, 0.999)
        method.turn(player)
        method.zero_grad()
        method.loss(batch, player).total.backward()
        torch.optim.Adam(group.parameters, lr=group.lr).step()
        for name, value in method.named_parameters():
            assert torch.equal(value, before[name]) == (name.split(".")[0] != player), name


def test_the_generator_learns_through_the_discriminator() -> None:
    method, batch = make(l1_weight=0.0)
    method.turn("generator")
    method.loss(batch, "generator").total.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.generator.up.parameters())


def test_translations_are_kept_for_their_own_batch_alone() -> None:
    method, batch = make(dropout=0.9)
    ((fake, *_),) = seen_by_the_discriminator(method, batch, "generator")
    same = Batch(batch.index, batch.images, batch.measured)
    _, (again, *_) = seen_by_the_discriminator(method, same, "discriminator")
    assert not torch.equal(again, fake)
    assert torch.equal(again[:, 0], fake[:, 0])
    assert method._shown is None  # no batch is held on to


def test_dropout_is_the_noise_of_training_alone() -> None:
    """`start` must not switch it off, though dropout has no parameters."""
    method, batch = make(dropout=0.5)
    assert not torch.equal(*(method.generator(batch.images[:, 1:2]) for _ in range(2)))
    method.eval()
    assert torch.equal(*(method.translate(batch.images, batch.measured, [0]).mean for _ in range(2)))


def test_a_single_target_needs_no_condition() -> None:
    method, batch = make(Panel(("P0", "DNA"), "DNA"))
    assert method.discriminator.embedding is None
    play(method, batch, 1)


def test_it_learns() -> None:
    method, batch = make(lr=5e-3)
    images = batch.images.clone()
    images[:, 0], images[:, 2], images[:, 3] = images[:, 1] * 0.5, 1 - images[:, 1], 0.3
    batch = Batch(batch.index, images * batch.measured[..., None, None], batch.measured)
    before = method.validate(batch).total
    log = play(method, batch, 60)
    assert log[-1]["generator/l1"] < 0.6 * log[0]["generator/l1"]
    assert method.validate(batch).total < before
    assert set(log[0]) == {
        "generator/l1", "generator/adversarial", "discriminator/adversarial", "discriminator/accuracy"
    }  # fmt: skip


def test_validation_is_the_l1_of_measured_targets() -> None:
    method, batch = make()
    method.eval()
    predicted = method.translate(batch.images, batch.measured, range(4)).mean
    off = [(predicted[i, c] - batch.images[i, c]).abs().mean() for i, c in expected_pairs(batch)]
    assert method.validate(batch).total.item() == pytest.approx(torch.stack(off).mean().item(), rel=1e-5)
    assert method.validate(batch).count == len(off)
    assert method.validate(Batch(batch.index, batch.images, batch.measured & (torch.arange(4) == 1))).count == 0
    assert not method.stages[0].monitored  # blur would win


def test_a_batch_without_any_pair_moves_nothing() -> None:
    method, batch = make()
    nothing = Batch(batch.index, batch.images, batch.measured & (torch.arange(4) == 1))
    for player in PLAYERS:
        method.turn(player)
        method.zero_grad()
        loss = method.loss(nothing, player)
        loss.total.backward()
        assert loss.total == 0
        assert not any(p.grad.any() for p in method.parameters() if p.grad is not None)


def test_a_prediction_knows_its_sources_alone() -> None:
    method, batch = make()
    method.eval()
    before = method.translate(batch.images, batch.measured, range(4)).mean
    other = batch.images.clone()
    other[:, [0, 2, 3]] = torch.rand(10, 3, 16, 16)
    assert torch.equal(before, method.translate(other, batch.measured, range(4)).mean)
    assert torch.equal(before[:, 1], batch.images[:, 1])


def test_odd_sizes_and_a_crop_inside_a_field() -> None:
    method, batch = make(channels=(4, 6))
    play(method, batch, 2)
    method.eval()
    field, measured = torch.rand(1, 4, 51, 49), torch.ones(1, 4, dtype=torch.bool)
    whole = method.translate(field, measured, [0, 2]).mean
    assert whole.shape == (1, 2, 51, 49)
    crop = method.translate(field[..., 4:44, 8:48], measured, [0, 2]).mean
    torch.testing.assert_close(crop[..., 14:-14, 14:-14], whole[..., 18:30, 22:34], atol=1e-5, rtol=1e-4)


def test_an_invincible_discriminator_is_reported() -> None:
    method, _ = make()
    assert method.signs({"discriminator/accuracy": 0.99}) == method.signs({}) == []
    (sentence,) = method.signs({"discriminator/accuracy": 0.996})
    assert "lower method.lr_discriminator or set method.r1_weight" in sentence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (4,) * 5}, "method.channels: a U-Net of 5 levels needs crops of at least 32 px, these have 16"),
        ({"discriminator_channels": (4,) * 6}, "method.discriminator_channels"),
    ],
)
def test_networks_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_cells_without_pairs_are_refused() -> None:
    method, batch = make()
    with pytest.raises(InputError, match="pix2pix learns from cells that show DNA and P3 together"):
        method.prepare(batch.measured & (torch.arange(4) != 3), seed=0)
