"""What CUT and CycleGAN share: what they are shown, whose turn it is, what they may know, what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from imgshared.build import build_method
from imgshared.config import CutConfig, CycleGanConfig
from imgshared.data.panel import Panel
from imgshared.methods.cut import Cut
from imgshared.methods.cyclegan import CycleGan
from imgshared.methods.unpaired import UnpairedMethod
from imgshared.types import Batch, InputError

PX = 16
CUT = CutConfig(width=4, blocks=2, patches=32, discriminator_channels=(4, 6))
CYCLEGAN = CycleGanConfig(width=4, blocks=2, buffer=6, discriminator_channels=(4, 6))
PANEL = Panel(("P1", "DNA", "P2", "P3"), "DNA", {"P2": ("Lamin",)})
BOTH = pytest.mark.parametrize("config", [CUT, CYCLEGAN], ids=["cut", "cyclegan"])
HALVES = [[0, 1, 0, 0]] * 4 + [[1, 0, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2  # of the cells show only the source


def make(config: CutConfig | CycleGanConfig, panel: Panel = PANEL, px: int = PX) -> UnpairedMethod:
    torch.manual_seed(0)
    method = build_method(config, panel, px)
    assert isinstance(method, Cut | CycleGan)
    for name, weights in method.named_parameters():  # as if learnt: markers differ
        if "modulation" in name:
            torch.nn.init.normal_(weights, 0, 0.05)
    method.start(method.stages[0])
    return method


def show(measured: list[list[int]], px: int = PX, seed: int = 1) -> Batch:
    """Return random images of cells that show the stains marked."""
    mask = torch.tensor(measured, dtype=torch.bool)
    images = torch.rand(*mask.shape, px, px, generator=torch.Generator().manual_seed(seed)) * mask[..., None, None]
    return Batch(torch.arange(len(mask)), images, mask)


def step(method: UnpairedMethod, batch: Batch, lr: float = 1e-3) -> dict[str, dict[str, float]]:
    """Let each player move once as the loop does; return the parts of their losses."""
    parts = {}
    for player, groups in method.stages[0].groups.items():
        method.turn(player)
        terms = method.loss(batch, player)
        method.zero_grad()
        terms.total.backward()
        torch.optim.SGD([p for g in groups for p in g.parameters], lr).step()
        parts[player] = {k: v.item() for k, v in terms.parts.items()}
    return parts


def weights_of(method: UnpairedMethod) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in method.named_parameters()}


@BOTH
def test_what_is_shown_comes_from_any_cell(config: CutConfig | CycleGanConfig) -> None:
    method, batch = make(config), show([*HALVES, [1, 1, 1, 1]])
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        views = method.draw(batch)
        assert torch.equal(views.sources[:, 0], batch.images[[0, 1, 2, 3, 8], 1])  # every cell with the source, once
        assert torch.equal(views.towards, views.markers)
        for image, marker in zip(views.reals[:, 0], views.markers.tolist(), strict=True):
            cell = next(i for i in range(9) if torch.equal(batch.images[i, marker], image))
            assert batch.measured[cell, marker]
            seen.add((cell, marker))
    assert seen == {(4, 0), (5, 0), (8, 0), (6, 2), (7, 2), (8, 2), (6, 3), (7, 3), (8, 3)}


@BOTH
def test_real_stains_are_drawn_evenly(config: CutConfig | CycleGanConfig) -> None:
    method, batch = make(config), show([[0, 1, 0, 0]] * 9 + [[1, 0, 0, 0]] * 3)
    reals = method.draw(batch).reals
    cells = [next(i for i in range(12) if torch.equal(batch.images[i, 0], r[0])) for r in reals]
    assert sorted(cells) == sorted([9, 10, 11] * 3)


@BOTH
def test_only_markers_of_the_batch_are_translated_to(config: CutConfig | CycleGanConfig) -> None:
    method, batch = make(config), show([[0, 1, 0, 0]] * 20 + [[1, 0, 0, 1]] * 2)
    assert set(method.draw(batch).towards.tolist()) == {0, 3}


@BOTH
@pytest.mark.parametrize("measured", [[[1, 1, 0, 0]] * 6, [[0, 1, 0, 0]] * 3 + [[1, 0, 0, 0]] * 3, HALVES])
def test_each_turn_moves_its_own_networks_alone(config: CutConfig | CycleGanConfig, measured: list[list[int]]) -> None:
    method, batch = make(config), show(measured)
    generators, discriminators = ({id(p) for n in networks for p in n.parameters()} for networks in method.players())
    assert not generators & discriminators
    assert generators | discriminators == {id(p) for p in method.parameters()}
    for player, own in (("generator", generators), ("discriminator", discriminators)):
        method.turn(player)
        before = weights_of(method)
        method.zero_grad()
        method.loss(batch, player).total.backward()
        torch.optim.SGD(method.parameters(), 0.1).step()
        for name, p in method.named_parameters():
            assert id(p) in own or torch.equal(p, before[name]), name
        moved = [not torch.equal(p, before[name]) for name, p in method.named_parameters() if id(p) in own]
        assert sum(moved) > 0.9 * len(moved)


@BOTH
def test_the_discriminator_judges_what_the_generator_has_made(config: CutConfig | CycleGanConfig) -> None:
    method, batch = make(config), show(HALVES)
    calls: list[Tensor] = []
    method.turn("generator")
    method.loss(batch, "generator")
    assert method._kept is not None
    views, fakes = method._kept[1:]
    assert not any(f.requires_grad for f in fakes)
    method.generator.register_forward_hook(lambda m, i, o: calls.append(o))
    method.turn("discriminator")
    kept = method.loss(batch, "discriminator")
    assert not calls  # nothing is translated a second time
    assert torch.equal(views.sources[:, 0], batch.images[:4, 1])
    anew = method.loss(batch, "discriminator")  # the kept ones are used once
    assert len(calls) == 1
    assert not calls[0].requires_grad
    assert kept.parts["adversarial"].item() == pytest.approx(anew.parts["adversarial"].item(), rel=0.5)
    method.loss(batch, "generator")
    calls.clear()
    method.loss(show(HALVES, seed=2), "discriminator")  # of another batch
    assert len(calls) == 1


@BOTH
@pytest.mark.parametrize(("kind", "middle"), [("lsgan", 0.5), ("hinge", 0.0), ("bce", 0.0)])
def test_accuracy_counts_patches_and_is_no_term(config: CutConfig | CycleGanConfig, kind: str, middle: float) -> None:
    method, batch = make(replace(config, adversarial=kind)), show(HALVES)
    for real, fake, share in ((1, -1, 1.0), (-1, 1, 0.0), (1, 1, 0.5)):
        logits = iter([real, fake] * 2)
        for discriminator in method.players()[1]:
            discriminator.forward = lambda x, m, at=logits: torch.full((len(x), 1, 2, 2), middle + next(at))  # type: ignore[method-assign]
        terms = method.loss(batch, "discriminator")
        names = ["accuracy"] if config.name == "cut" else ["target/accuracy", "source/accuracy"]
        assert set(terms.parts) == {"adversarial", *names}
        assert [terms.parts[name].item() for name in names] == [share] * len(names)
        assert terms.total == terms.parts["adversarial"]
        assert not any(terms.parts[name].requires_grad for name in names)


@BOTH
def test_r1_is_weighted_and_needs_no_norm(config: CutConfig | CycleGanConfig) -> None:
    method, batch = make(replace(config, r1_weight=3.0)), show(HALVES)
    assert not [m for n in method.players()[1] for m in n.modules() if isinstance(m, torch.nn.InstanceNorm2d)]
    assert [m for n in make(config).players()[1] for m in n.modules() if isinstance(m, torch.nn.InstanceNorm2d)]
    torch.manual_seed(5)
    views = method.draw(batch)
    torch.manual_seed(5)
    terms = method.loss(batch, "discriminator")
    want = 0.0
    sides = [(views.reals, views.markers), (views.sources, None)]
    for discriminator, (images, markers) in zip(method.players()[1], sides, strict=False):
        x = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(discriminator(x, markers).sum(), x)
        want += 3.0 / 2 * slope.square().sum((1, 2, 3)).mean().item()
    assert terms.parts["r1"].item() == pytest.approx(want, rel=1e-4)
    assert terms.total.item() == pytest.approx((terms.parts["adversarial"] + terms.parts["r1"]).item())
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.loss(batch, "discriminator")
    terms.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n in method.players()[1] for p in n.parameters())


@BOTH
@pytest.mark.parametrize("measured", [[[0, 1, 0, 0]] * 4, [[1, 0, 1, 0]] * 4, [[0, 0, 0, 0]] * 4])
def test_a_batch_that_lacks_a_side(config: CutConfig | CycleGanConfig, measured: list[list[int]]) -> None:
    method, batch = make(config), show(measured)
    for seed in range(3):
        torch.manual_seed(seed)
        parts = step(method, batch)
        assert parts["discriminator"] == {}
        assert bool(parts["generator"]) == batch.measured.any()
    assert all(p.isfinite().all() for p in method.parameters())
    method.turn("discriminator")
    assert method.loss(batch, "discriminator").total == 0
    with torch.no_grad():
        terms = method.validate(batch)
        assert terms.total.isfinite()
        assert (terms.count == 0) == (not terms.parts)


@BOTH
def test_targets_do_not_leak_into_predictions(config: CutConfig | CycleGanConfig) -> None:
    method, batch = make(config), show([[1, 1, 1, 1]] * 3)
    with torch.no_grad():
        out = method.translate(batch.images, batch.measured, [0, 1, 2, 3]).mean
        changed = batch.images.clone()
        changed[:, [0, 2, 3]] = 7.0
        only = torch.tensor([[False, True, False, False]] * 3)
        assert torch.equal(method.translate(changed, only, [0, 1, 2, 3]).mean, out)
        assert torch.equal(out[:, 1], batch.images[:, 1])  # the source is known
        assert not torch.allclose(out[:, 0], out[:, 2], atol=1e-3)
        assert torch.equal(method.translate(batch.images, batch.measured, [3, 0]).mean, out[:, [3, 0]])
        hidden = method.translate(batch.images, ~only, [0, 1]).mean  # a source that is not marked is not looked at
        assert torch.equal(hidden, method.translate(torch.zeros_like(batch.images), only, [0, 1]).mean)
    assert method.sources == (1,)


@BOTH
@pytest.mark.parametrize("px", [17, 24])
def test_odd_sizes_train_and_translate(config: CutConfig | CycleGanConfig, px: int) -> None:
    method, batch = make(config, px=px), show(HALVES, px)
    assert step(method, batch)["generator"].keys() >= {"adversarial"}
    out = method.translate(batch.images[..., :13], batch.measured, [0]).mean
    assert out.shape == (8, 1, px, 13)
    assert out.isfinite().all()


@BOTH
def test_any_marker_can_be_the_source(config: CutConfig | CycleGanConfig) -> None:
    method = make(replace(config, source="lamin"))
    assert (method.sources, method.targets) == ((2,), (0, 1, 3))
    with pytest.raises(InputError, match="no marker 'P9'"):
        make(replace(config, source="P9"))


@BOTH
def test_one_target_needs_no_condition(config: CutConfig | CycleGanConfig) -> None:
    method = make(config, Panel(("DNA", "P"), "DNA"))
    assert not [n for n, _ in method.named_parameters() if "embedding" in n or "modulation" in n]
    step(method, show([[1, 0]] * 3 + [[0, 1]] * 2))


@BOTH
def test_refusals(config: CutConfig | CycleGanConfig) -> None:
    method = make(config)
    method.prepare(torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.bool), seed=0)  # no pair is fine
    with pytest.raises(InputError, match=rf"{config.name} learns from cells that show DNA, .*another method\.source"):
        method.prepare(torch.tensor([[1, 0, 1, 1]], dtype=torch.bool), seed=0)
    with pytest.raises(InputError, match=r"show P3, and none does: leave it out \(markers=\.\.\.\)"):
        method.prepare(torch.tensor([[1, 1, 1, 0]], dtype=torch.bool), seed=0)
    with pytest.raises(InputError, match=r"show DNA, and none does: it is chromatin, which every panel keeps"):
        make(replace(config, source="P1")).prepare(torch.tensor([[1, 0, 1, 1]], dtype=torch.bool), seed=0)
    with pytest.raises(InputError, match=r"method\.discriminator_channels"):
        make(replace(config, discriminator_channels=(4, 4, 4, 4)))
    with pytest.raises(InputError, match=r"method\.source: DNA is the only marker"):
        make(config, Panel(("DNA",), "DNA"))


@BOTH
def test_a_discriminator_that_wins_is_told(config: CutConfig | CycleGanConfig) -> None:
    method = make(config)
    assert method.signs({"loss": 5.0, "discriminator/accuracy": 0.98}) == []
    (sentence,) = method.signs({"discriminator/accuracy": 0.995})
    assert "lower method.lr_discriminator or set method.r1_weight" in sentence


def test_one_winner_of_two_is_told_by_name() -> None:
    one = {"discriminator/target/accuracy": 0.5, "discriminator/source/accuracy": 0.999}
    (sentence,) = make(CYCLEGAN).signs(one)
    assert sentence.startswith("the discriminator of the source tells real from predicted every time (99.9%")
    both = make(CYCLEGAN).signs(dict.fromkeys(one, 1.0))
    assert ["of the target" in s for s in both] == [True, False]


@BOTH
def test_a_discriminator_that_is_never_asked_is_told(config: CutConfig | CycleGanConfig) -> None:
    method = make(config)
    (sentence,) = method.signs({"loss": 5.0, "adversarial": 1.0})
    assert "no part of a batch held DNA and another stain" in sentence
    assert "raise train.batch_size, set train.balance=panels" in sentence


@BOTH
def test_the_stage(config: CutConfig | CycleGanConfig) -> None:
    (stage,) = make(replace(config, lr=1e-3, lr_discriminator=2e-3, lr_decay=0.25, epochs=7)).stages
    assert (stage.epochs, stage.monitored, stage.lr_decay) == (7, False, 0.25)
    assert list(stage.groups) == ["generator", "discriminator"]
    rates = [(g.lr, g.betas) for groups in stage.groups.values() for g in groups]
    assert rates == [(1e-3, (0.5, 0.999)), (2e-3, (0.5, 0.999))]


@BOTH
def test_validation_is_the_same_for_the_same_weights(config: CutConfig | CycleGanConfig) -> None:
    method, batch = make(replace(config, **({"patches": 400} if config.name == "cut" else {}))), show(HALVES)
    state = torch.get_rng_state()
    with torch.no_grad():
        first = method.validate(batch)
        torch.manual_seed(99)
        again = method.validate(batch)
    torch.set_rng_state(state)
    assert first.total.item() == pytest.approx(again.total.item(), rel=1e-5)
    assert all(torch.get_rng_state() == state)
