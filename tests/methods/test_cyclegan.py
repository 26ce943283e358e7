"""CycleGAN against its formulas: both ways, the pools of earlier translations, resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from imgshared.config import CycleGanConfig, Experiment, load
from imgshared.data.panel import Panel
from imgshared.methods.cyclegan import CycleGan
from imgshared.types import Batch

PX = 16
SMALL = CycleGanConfig(width=4, blocks=2, buffer=0, discriminator_channels=(4, 6))
PANEL = Panel(("DNA", "P1", "P2"), "DNA")
HALVES = torch.tensor([[1, 0, 0]] * 3 + [[0, 1, 0]] * 2 + [[0, 0, 1]], dtype=torch.bool)


def make(config: CycleGanConfig = SMALL, panel: Panel = PANEL) -> CycleGan:
    torch.manual_seed(0)
    method = CycleGan(config, panel=panel, crop_px=PX)
    for name, weights in method.named_parameters():  # as if learnt: markers differ
        if "modulation" in name:
            torch.nn.init.normal_(weights, 0, 0.1)
    method.start(method.stages[0])
    return method


def cells(measured: Tensor = HALVES, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(*measured.shape, PX, PX, generator=generator) * measured[..., None, None]
    return Batch(torch.arange(len(measured)), images, measured)


def drawn(method: CycleGan, batch: Batch, seed: int):
    torch.manual_seed(seed)
    views = method.draw(batch)
    torch.manual_seed(seed)
    return views


@pytest.mark.parametrize("change", [{}, {"cycle_weight": 3.0, "identity_weight": 2.0}, {"identity_weight": 0.0}])
def test_the_generators_minimise_the_published_sum(change: dict[str, float]) -> None:
    method, batch = make(replace(SMALL, **change)), cells()
    c, views = method.config, drawn(method, batch, 3)
    terms = method.loss(batch, "generator")
    x, y, m = views.sources, views.reals, views.markers
    g, f, d_y, d_x = method.generator, method.back, method.discriminator, method.source_discriminator
    fake_y, fake_x = g(x, m), f(y, m)
    want = {
        "adversarial": (d_y(fake_y, m) - 1).square().mean() + (d_x(fake_x) - 1).square().mean(),
        "cycle": c.cycle_weight * ((f(fake_y, m) - x).abs().mean() + (g(fake_x, m) - y).abs().mean()),
    }
    if c.identity_weight:
        identity = (g(y, m) - y).abs().mean() + (f(x, m) - x).abs().mean()
        want["identity"] = c.cycle_weight * c.identity_weight * identity
    assert terms.parts.keys() == want.keys()
    for name, value in want.items():
        assert terms.parts[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert terms.total.item() == pytest.approx(sum(v.item() for v in want.values()), rel=1e-4)


def test_the_discriminators_minimise_the_published_sum() -> None:
    method, batch = make(), cells()
    views = drawn(method, batch, 4)
    terms = method.loss(batch, "discriminator")
    x, y, m = views.sources, views.reals, views.markers
    want = torch.zeros(())
    for d, real, fake in (
        (lambda i: method.discriminator(i, m), y, method.generator(x, m)),
        (method.source_discriminator, x, method.back(y, m)),
    ):
        want = want + 0.5 * ((d(real) - 1).square().mean() + d(fake.detach()).square().mean())
    assert terms.total.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize(("change", "calls"), [({}, 3), ({"identity_weight": 0.0}, 2), ({"cycle_weight": 0.0}, 1)])
def test_what_has_no_weight_is_not_computed(change: dict[str, float], calls: int) -> None:
    method, batch = make(replace(SMALL, **change)), cells()
    ran: list[str] = []
    for name in ("generator", "back"):
        getattr(method, name).register_forward_hook(lambda m, i, o, name=name: ran.append(name))
    method.loss(batch, "generator")
    assert sorted(ran) == ["back"] * calls + ["generator"] * calls


@pytest.mark.parametrize(("measured", "image"), [([[True, False, False]] * 3, 0), ([[False, True, False]] * 3, 1)])
def test_one_side_alone_teaches_its_own_way(measured: list[list[bool]], image: int) -> None:
    method, batch = make(), cells(torch.tensor(measured))
    views = drawn(method, batch, 2)
    terms = method.loss(batch, "generator")
    x, m = (views.sources, views.towards) if image == 0 else (views.reals, views.markers)
    there, back = (method.generator, method.back) if image == 0 else (method.back, method.generator)
    shown = sorted(x[:, 0].sum((1, 2)).tolist())  # every cell once; those with the target in any order
    assert shown == sorted(batch.images[:, image].sum((1, 2)).tolist())
    assert terms.parts["cycle"].item() == pytest.approx(10 * (back(there(x, m), m) - x).abs().mean().item(), rel=1e-4)
    assert terms.parts["identity"].item() == pytest.approx(5 * (back(x, m) - x).abs().mean().item(), rel=1e-4)


def test_discriminators_are_shown_earlier_translations() -> None:
    method = make(replace(SMALL, buffer=4))
    shown: list[tuple[Tensor, Tensor]] = []
    method.discriminator.register_forward_hook(lambda m, i, o: shown.append(i))
    made: list[Tensor] = []
    old = 0
    for seed in range(8):
        batch = cells(seed=seed)
        torch.manual_seed(seed)
        method.loss(batch, "generator")
        kept = method._kept
        assert kept is not None
        made.extend(kept[2][0])
        shown.clear()
        method.loss(batch, "discriminator")
        fakes, markers = shown[1]
        assert len(fakes) == len(markers) == 3
        assert all(any(torch.equal(f, image) for image in made) for f in fakes)
        old += sum(not any(torch.equal(f, new) for new in made[-3:]) for f in fakes)
    assert 3 <= old <= 15  # half of the 20 that came after the pool was full, by chance
    assert method.pool.count == method.source_pool.count == 4
    for image, marker in zip(method.pool.images, method.pool.markers, strict=True):
        assert any(torch.equal(image, m) for m in made)
        assert marker in (1, 2)


def test_a_resumed_run_goes_on_with_its_pools() -> None:
    def play(method: CycleGan, seeds: range) -> list[float]:
        losses = []
        for seed in seeds:
            torch.manual_seed(seed)
            batch = cells(seed=seed)
            method.loss(batch, "generator")
            losses.append(method.loss(batch, "discriminator").total.item())
        return losses

    config = replace(SMALL, buffer=5)
    method = make(config)
    play(method, range(4))
    resumed = make(config)
    resumed.load_state_dict({k: v.clone() for k, v in method.state_dict().items()})
    assert play(resumed, range(4, 8)) == play(method, range(4, 8))
    assert play(make(config), range(4, 8)) != play(method, range(4, 8))


def test_held_out_loss_is_the_error_of_both_cycles() -> None:
    method, batch = make(), cells()
    with torch.no_grad():
        terms = method.validate(batch)
        views = method.draw_same(batch)
        x, y, m = views.sources, views.reals, views.markers
        there = (method.back(method.generator(x, m), m) - x).abs().mean()
        back = (method.generator(method.back(y, m), m) - y).abs().mean()
    assert terms.count == len(x) + len(y)
    assert terms.parts["source/cycle"].item() == pytest.approx(there.item(), rel=1e-4)
    assert terms.total.item() == pytest.approx((there + back).item(), rel=1e-4)


def histograms_apart(method: CycleGan, images: Tensor, measured: Tensor) -> float:
    """How far the intensities of the translations are, sorted, from those of real stains."""
    with torch.no_grad():
        out = method.translate(images[measured[:, 0]], measured[measured[:, 0]], [1]).mean
    real = images[measured[:, 1], 1]
    return (out.flatten().sort().values - real.flatten().sort().values).abs().mean().item()


def test_it_learns_the_way_back_from_cells_that_never_show_both() -> None:
    """P is DNA's negative; half of the cells show the one, half the other. Either sign makes a cycle."""
    torch.manual_seed(0)
    n = 48
    dna = 0.1 * torch.rand(n, 1, PX, PX)
    for i in range(n):
        y, x = torch.randint(2, 8, (2,)).tolist()
        dna[i, 0, y : y + 6, x : x + 6] += 0.8
    measured = (torch.arange(n) % 2 == 0)[:, None] == torch.tensor([True, False])
    images = torch.cat([dna, 1 - dna], 1) * measured[..., None, None]
    config = CycleGanConfig(width=8, blocks=1, discriminator_channels=(8, 16))
    method = make(config, Panel(("DNA", "P"), "DNA"))
    optimizers = {
        player: torch.optim.Adam([{"params": g.parameters, "lr": 1e-3} for g in groups], betas=(0.5, 0.999))
        for player, groups in method.stages[0].groups.items()
    }
    before = histograms_apart(method, images, measured)
    cycles = []
    for _ in range(100):
        rows = torch.randperm(n)[:16]
        batch = Batch(rows, images[rows], measured[rows])
        for player, optimizer in optimizers.items():
            method.turn(player)
            terms = method.loss(batch, player)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            if player == "generator":
                cycles.append(terms.parts["cycle"].item())
    assert sum(cycles[-10:]) < 0.4 * sum(cycles[:10])
    assert histograms_apart(method, images, measured) < 0.3 * before


def test_half_precision_reaches_every_weight() -> None:
    method, batch = make(), cells()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [method.loss(batch, player).total for player in ("generator", "discriminator")]
    torch.stack(losses).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_the_shipped_configuration_is_the_papers(request: pytest.FixtureRequest) -> None:
    experiment = load(Experiment, request.config.rootpath / "configs" / "cyclegan.yaml")
    c = experiment.method
    assert isinstance(c, CycleGanConfig)
    assert (c.cycle_weight, c.identity_weight, c.buffer, c.adversarial, c.lr) == (10, 0.5, 50, "lsgan", 2e-4)
    assert (experiment.train.balance, experiment.train.ema) == ("panels", 0.99)
