"""CUT against its formulas: what the generator minimises, and what FastCUT changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imgshared.config import CutConfig, Experiment, load
from imgshared.data.panel import Panel
from imgshared.methods.cut import Cut
from imgshared.types import Batch, InputError

PX = 16
SMALL = CutConfig(width=4, blocks=3, patches=10_000, discriminator_channels=(4, 6))  # all positions: nothing is drawn
PANEL = Panel(("DNA", "P1", "P2"), "DNA")
HALVES = torch.tensor([[1, 0, 0]] * 3 + [[0, 1, 0]] * 2 + [[0, 0, 1]], dtype=torch.bool)


def make(config: CutConfig = SMALL, panel: Panel = PANEL) -> Cut:
    torch.manual_seed(0)
    method = Cut(config, panel=panel, crop_px=PX)
    for name, weights in method.named_parameters():  # as if learnt: markers differ, patches too
        if "modulation" in name or "projection" in name:
            torch.nn.init.normal_(weights, 0, 0.2)
    method.start(method.stages[0])
    return method


def cells(measured: Tensor = HALVES) -> Batch:
    images = torch.rand(*measured.shape, PX, PX, generator=torch.Generator().manual_seed(1)) * measured[..., None, None]
    return Batch(torch.arange(len(measured)), images, measured)


def nce(method: Cut, x: Tensor, translated: Tensor, marker: Tensor, flip: bool = False) -> Tensor:
    """-log(exp(v.v+ / t) / (exp(v.v+ / t) + sum over negatives exp(v.v- / t))), mean over patches, then over layers."""
    c, losses = method.config, []
    of_query, of_key = (method.generator.features(i, c.nce_layers, marker) for i in (translated, x))
    for level, query, key in zip(method.projection.levels, of_query, of_key, strict=True):
        query = query.flip(-1) if flip else query
        q, k = (F.normalize(level(f.permute(0, 2, 3, 1)), dim=-1).flatten(1, 2) for f in (query, key))
        if c.negatives == "batch":
            q, k = q.flatten(0, 1)[None], k.flatten(0, 1)[None]
        chance = torch.softmax(torch.einsum("bsd,btd->bst", q, k) / c.temperature, 2)
        losses.append(-chance.diagonal(dim1=1, dim2=2).log().mean())
    return torch.stack(losses).mean()


def drawn(method: Cut, batch: Batch, seed: int):
    torch.manual_seed(seed)
    views = method.draw(batch)
    torch.manual_seed(seed)
    return views


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"negatives": "batch", "temperature": 0.3},
        {"nce_layers": (3, 1), "nce_weight": 4.0},
        {"identity_weight": 0.25, "nce_weight": 2.0},
        {"identity_weight": 0.0, "nce_weight": 10.0},
    ],
)
def test_the_generator_minimises_the_published_sum(change: dict[str, object]) -> None:
    method, batch = make(replace(SMALL, **change)), cells()  # type: ignore[arg-type]
    c, views = method.config, drawn(method, batch, 3)
    terms = method.loss(batch, "generator")
    x, y, m = views.sources, views.reals, views.markers
    fake, same = method.generator(x, m), method.generator(y, m)
    adversarial = (method.discriminator(fake, m) - 1).square().mean()
    want = nce(method, x, fake, m)
    if c.identity_weight:
        want = (want + c.identity_weight * nce(method, y, same, m)) / (1 + c.identity_weight)
    assert terms.total.item() == pytest.approx((adversarial + c.nce_weight * want).item(), rel=1e-4)
    assert set(terms.parts) == {"adversarial", "nce"} | ({"nce_identity"} if c.identity_weight else set())
    assert terms.parts["adversarial"].item() == pytest.approx(adversarial.item(), rel=1e-4)


def test_the_discriminator_minimises_the_published_sum() -> None:
    method, batch = make(), cells()
    views = drawn(method, batch, 4)
    terms = method.loss(batch, "discriminator")
    fake = method.generator(views.sources, views.towards)
    real, made = method.discriminator(views.reals, views.markers), method.discriminator(fake, views.towards)
    want = 0.5 * ((real - 1).square().mean() + made.square().mean())
    assert terms.total.item() == pytest.approx(want.item(), rel=1e-5)


def test_the_source_teaches_by_its_translation_alone() -> None:
    """Keys are detached: the contrast moves the translation towards the source, not the source's features."""
    method, batch = make(replace(SMALL, identity_weight=0.0)), cells()
    views = drawn(method, batch, 3)
    method.loss(batch, "generator").total.backward()
    got = method.generator.stem.weight.grad
    assert got is not None
    method.zero_grad()
    m = views.towards
    fake = method.generator(views.sources, m)
    queries = method.generator.features(fake, (0, 1, 2, 3, 4), m)
    with torch.no_grad():
        keys = method.generator.features(views.sources, (0, 1, 2, 3, 4), m)
    want = (method.discriminator(fake, m) - 1).square().mean()
    for level, query, key in zip(method.projection.levels, queries, keys, strict=True):
        q = F.normalize(level(query.flatten(2).mT), dim=-1)
        k = F.normalize(level(key.flatten(2).mT), dim=-1).detach()
        want = want - torch.log_softmax(q @ k.mT / 0.07, 2).diagonal(dim1=1, dim2=2).mean() / 5
    want.backward()
    torch.testing.assert_close(got, method.generator.stem.weight.grad, rtol=1e-3, atol=1e-5)


def test_fastcut_asks_that_a_mirror_image_be_translated_alike() -> None:
    method, batch = make(replace(SMALL, identity_weight=0.0, flip_equivariance=True)), cells()
    seen = set()
    for seed in range(8):
        views = drawn(method, batch, seed)
        terms = method.loss(batch, "generator")
        kept = method._kept
        assert kept is not None
        x, m = views.sources, views.towards
        straight, mirrored = method.generator(x, m), method.generator(x.flip(-1), m)
        flipped = torch.equal(kept[2][0], mirrored)  # the discriminator sees it as it was made
        assert flipped or torch.equal(kept[2][0], straight)
        want = nce(method, x, mirrored, m, flip=True) if flipped else nce(method, x, straight, m)
        assert terms.parts["nce"].item() == pytest.approx(want.item(), rel=1e-4)
        seen.add(flipped)
    assert seen == {True, False}


def test_what_has_no_weight_is_not_computed() -> None:
    method, batch = make(replace(SMALL, identity_weight=0.0)), cells()
    calls: list[Tensor] = []
    method.generator.register_forward_hook(lambda m, i, o: calls.append(o))
    method.loss(batch, "generator")
    assert len(calls) == 1
    method = make(replace(SMALL, nce_weight=0.0))
    method.generator.features = None  # type: ignore[assignment]
    assert set(method.loss(batch, "generator").parts) == {"adversarial"}


def test_patches_are_as_many_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make(replace(SMALL, patches=9))
    sizes: list[int] = []
    for level in method.projection.levels:
        level.register_forward_hook(lambda m, i, o: sizes.append(o.shape[1]))
    method.loss(cells(), "generator")
    assert set(sizes) == {9}


def test_held_out_loss_is_the_nce_of_the_sources() -> None:
    method, batch = make(replace(SMALL, nce_weight=5.0)), cells()
    with torch.no_grad():
        terms = method.validate(batch)
        views = method.draw_same(batch)
        assert terms.count == len(views.sources)
        fake = method.generator(views.sources, views.towards)
        assert terms.total.item() == pytest.approx(nce(method, views.sources, fake, views.towards).item(), rel=1e-4)


@pytest.mark.parametrize("layers", [(), (0, 5), (-1,), (2, 2)])
def test_levels_that_do_not_exist_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"method\.nce_layers"):
        make(replace(SMALL, nce_layers=layers))


def test_half_precision_is_close_and_reaches_every_weight() -> None:
    method, batch = make(), cells()
    torch.manual_seed(3)
    exact = method.loss(batch, "generator").total
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(batch, "generator").total
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    loss.backward()
    networks = method.players()[0]
    assert all(p.grad is not None and p.grad.any() for n in networks for p in n.parameters() if p.ndim > 1)


def test_it_learns_a_stain_from_cells_that_never_show_both() -> None:
    """DNA is a square somewhere, P its rim; half of the cells show the one, half the other."""
    torch.manual_seed(0)
    n = 48
    square = torch.zeros(n, 1, PX, PX)
    for i in range(n):
        y, x = torch.randint(2, 8, (2,)).tolist()
        square[i, 0, y : y + 6, x : x + 6] = 0.8
    rim = square + F.max_pool2d(-square, 3, 1, 1)
    dna = square + 0.1 * torch.rand_like(square)
    measured = (torch.arange(n) % 2 == 0)[:, None] == torch.tensor([True, False])
    images = torch.cat([dna, rim], 1) * measured[..., None, None]
    config = CutConfig(width=8, blocks=1, patches=64, discriminator_channels=(8, 16))
    method = make(config, Panel(("DNA", "P"), "DNA"))
    optimizers = {
        player: torch.optim.Adam([{"params": g.parameters, "lr": 1e-3} for g in groups], betas=(0.5, 0.999))
        for player, groups in method.stages[0].groups.items()
    }

    def likeness() -> float:
        with torch.no_grad():
            out = method.translate(images[measured[:, 0]], measured[measured[:, 0]], [1]).mean
        return torch.corrcoef(torch.stack([out.flatten(), rim[measured[:, 0]].flatten()]))[0, 1].item()

    losses, before = [], likeness()
    for _ in range(80):
        rows = torch.randperm(n)[:16]
        batch = Batch(rows, images[rows], measured[rows])
        for player, optimizer in optimizers.items():
            method.turn(player)
            terms = method.loss(batch, player)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            if player == "generator":
                losses.append(terms.parts["nce"].item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert likeness() > max(before, 0.3)


def test_the_shipped_configurations_are_the_papers(request: pytest.FixtureRequest) -> None:
    cut, fast = (load(Experiment, request.config.rootpath / "configs" / f"{n}.yaml") for n in ("cut", "fastcut"))
    assert isinstance(cut.method, CutConfig)
    assert (cut.method.nce_weight, cut.method.identity_weight, cut.method.flip_equivariance) == (1, 1, False)
    assert cut.method.lr_decay == 0.5  # 200 and 200 epochs
    changes = {"nce_weight": 10.0, "identity_weight": 0.0, "flip_equivariance": True}
    assert fast.method == replace(cut.method, **changes, lr_decay=0.25)  # 150 and 50
    assert (cut.train, cut.train.balance, cut.train.ema) == (fast.train, "panels", 0.99)
