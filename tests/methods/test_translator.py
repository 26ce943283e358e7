"""The translator's terms against their formulas, written out cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imgshared import losses
from imgshared.methods import translator
from imgshared.methods.translator import Translator
from imgshared.models.pyramid import pool_to_middle
from imgshared.models.translation import less_wide
from imgshared.types import Batch

DNA, SIDE = 1, 16
Make = Callable[..., tuple[Translator, Batch]]
ALL_VISIBLE = {"chromatin_only": 0.0}


# --- the formulas, one stain of one cell at a time ------------------------------------------------------------------


def maps(method: Translator, batch: Batch, i: int, c: int) -> translator.Maps:
    return method.network.encode(batch.images[i : i + 1, c : c + 1], torch.tensor([c]))


def fused(method: Translator, batch: Batch, i: int, seen: Sequence[int]) -> list[Tensor]:
    levels = zip(*[maps(method, batch, i, c).shared for c in seen], strict=True)
    assert method.network.trust is not None
    counts = method.network.trust[list(seen)].mul(10 / 6).tanh().mul(6).exp().split(method.network.widths, 1)
    shares = [w / w.sum(0) for w in counts]
    return [
        sum((w[None, :, None, None] * h for w, h in zip(share, level, strict=True)), torch.zeros(()))
        for share, level in zip(shares, levels, strict=True)
    ]


def draw(method: Translator, shared: Sequence[Tensor], c: int, detail: Tensor | None = None) -> Tensor:
    return method.network.decode(method.network.shared_path(shared), torch.tensor([c]), (SIDE, SIDE), detail)[0]


def visible(method: Translator, batch: Batch, i: int) -> list[int]:
    own = [c for c in range(batch.measured.shape[1]) if batch.measured[i, c]]
    return [DNA] if method.config.chromatin_only and DNA in own else own


def stains(method: Translator, batch: Batch, hidden: bool = False) -> list[tuple[int, int]]:
    """(cell, channel) of the visible stains, or of the hidden ones."""
    every = [(i, c) for i, c in batch.measured.nonzero().tolist()]
    return [(i, c) for i, c in every if (c in visible(method, batch, i)) != hidden]


def mean(values: Sequence[Tensor]) -> float:
    return torch.stack([v.detach() for v in values]).mean().item()


def pooled(levels: Sequence[Tensor]) -> Tensor:
    return pool_to_middle(levels, (2, 4), (SIDE, SIDE))[0]


def full(m: Translator, b: Batch) -> float:
    drawn = [
        draw(m, fused(m, b, i, visible(m, b, i)), c, m.network.own_detail(maps(m, b, i, c).specific))
        for i, c in stains(m, b)
    ]
    return mean([(x - b.images[i, c]).square().mean() for x, (i, c) in zip(drawn, stains(m, b), strict=True)])


def predicted(m: Translator, b: Batch, which: list[tuple[int, int]]) -> float:
    drawn = [draw(m, fused(m, b, i, visible(m, b, i)), c) for i, c in which]
    return mean([(x - b.images[i, c]).square().mean() for x, (i, c) in zip(drawn, which, strict=True)])


def contrast(m: Translator, pairs: list[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> float:
    """InfoNCE over the places of each (query, key) pair of maps, or of all of them together."""
    assert m.projection is not None
    each = []
    for level in range(2):
        mlp = m.projection.levels[level]
        rows = [[F.normalize(mlp(h[level][0].flatten(1).T), dim=1) for h in pair] for pair in pairs]
        if m.config.negatives == "batch":
            rows = [[torch.cat(side) for side in zip(*rows, strict=True)]]
        each.append(mean([-(q @ k.T / m.config.temperature).log_softmax(1).diagonal().mean() for q, k in rows]))
    return sum(each) / 2


def patch_nce_identity(m: Translator, b: Batch) -> float:
    pairs = []
    for i, c in stains(m, b):
        real = maps(m, b, i, c).shared
        again = m.network.encode(draw(m, real, c), torch.tensor([c])).shared
        pairs.append((again, real))
    return contrast(m, pairs)


def identity(m: Translator, b: Batch) -> float:
    each = [(draw(m, maps(m, b, i, c).shared, c) - b.images[i, c]).abs().mean() for i, c in stains(m, b)]
    return mean(each)


def norm(m: Translator, b: Batch) -> float:
    shared = torch.stack([pooled(fused(m, b, i, visible(m, b, i))) for i in range(len(b.index))])
    specific = torch.stack([pooled(maps(m, b, i, c).specific) for i, c in stains(m, b)])
    return sum(z.norm(dim=1).mean().item() / z.shape[1] for z in (shared, specific))


def agreement(m: Translator, b: Batch) -> float:
    both = [i for i in range(len(b.index)) if b.measured[i].sum() == 2]
    one = torch.stack([pooled(maps(m, b, i, DNA).shared) for i in both])
    other = torch.stack([pooled(maps(m, b, i, 2 - 2 * int(b.measured[i, 0])).shared) for i in both])
    return (losses.info_nce if m.config.agreement == "infonce" else losses.triplet)(one, other).item()


def independence(m: Translator, b: Batch) -> float:
    measure = losses.hsic if m.config.independence == "hsic" else losses.cross_covariance
    each = []
    for c in (0, DNA):  # P2 is measured in five cells: too few to say
        found = [maps(m, b, i, c) for i in b.measured[:, c].nonzero()[:, 0].tolist()]
        pair = [torch.stack([pooled(x) for x in side]) for side in zip(*[(f.shared, f.specific) for f in found])]  # noqa: B905
        each.append(measure(*pair))
    return mean(each)


def kl(m: Translator, b: Batch) -> float:
    each = []
    for level in range(2):
        values = []
        for i in range(len(b.index)):
            experts = [maps(m, b, i, c) for c in visible(m, b, i)]
            precision = [(-2 * e.log_std[level]).exp() for e in experts]
            total = 1 + sum(precision)
            centre = sum(e.shared[level] * p for e, p in zip(experts, precision, strict=True)) / total
            values.append(0.5 * (centre**2 + 1 / total - 1 + total.log()).sum() / SIDE**2)
        each.append(mean(values))
    return sum(each)


@pytest.mark.parametrize("seen", [{}, ALL_VISIBLE])
@pytest.mark.parametrize(
    ("name", "settings", "formula"),
    [
        ("full", {}, full),
        ("shared", {}, lambda m, b: predicted(m, b, stains(m, b))),
        ("identity", {}, identity),
        ("patch_nce_identity", {"patches": 999}, patch_nce_identity),
        ("patch_nce_identity", {"patches": 999, "negatives": "batch"}, patch_nce_identity),
        ("norm", {}, norm),
        ("agreement", {}, agreement),
        ("agreement", {"agreement": "triplet"}, agreement),
        ("independence", {}, independence),
        ("independence", {"independence": "cross_covariance", "encoders": "marker"}, independence),
        ("kl", {"fusion": "product"}, kl),
    ],
)
def test_a_term_is_its_formula(
    name: str,
    settings: dict[str, str],
    formula: Callable[[Translator, Batch], float],
    seen: dict[str, float],
    make: Make,
    three_stains: Tensor,
) -> None:
    method, batch = make(three_stains, {name: 0.7}, **settings, **seen)
    terms = method.loss(batch, "generator")
    watched = {"kl_low", "kl_median", "kl_high", "active_dimensions"} if name == "kl" else set()
    assert set(terms.parts) == {name} | watched
    assert terms.total.item() == pytest.approx(0.7 * formula(method, batch), rel=1e-4)
    assert terms.parts[name].item() == terms.total.item()


def test_cross_is_the_error_of_what_was_hidden(make: Make, three_stains: Tensor) -> None:
    method, batch = make(three_stains, {"cross": 0.7})
    want = 0.7 * predicted(method, batch, stains(method, batch, hidden=True))
    assert method.loss(batch, "generator").total.item() == pytest.approx(want, rel=1e-4)
    method, batch = make(three_stains, {"cross": 0.7}, **ALL_VISIBLE)
    total = method.loss(batch, "generator").total  # nothing is hidden
    assert total.item() == 0
    total.backward()


@pytest.mark.parametrize("head", ["laplace", "gaussian"])
def test_a_head_with_a_scale_minimises_the_likelihood(head: str, make: Make, three_stains: Tensor) -> None:
    method, batch = make(three_stains, {"cross": 1.0}, head=head)
    each = []
    for i, c in stains(method, batch, hidden=True):
        trunk = method.network.shared_path(fused(method, batch, i, [DNA]))
        m, log_scale = method.network.decode(trunk, torch.tensor([c]), (SIDE, SIDE))
        assert log_scale is not None
        kind = torch.distributions.Laplace if head == "laplace" else torch.distributions.Normal
        each.append(-kind(m, log_scale.exp()).log_prob(batch.images[i, c]).mean())  # type: ignore[no-untyped-call]
    assert method.loss(batch, "generator").total.item() == pytest.approx(mean(each), rel=1e-4)


def fakes(method: Translator, batch: Batch) -> dict[int, tuple[int, int, Tensor]]:
    """By cell: source, target, translation. Of two markers, the target is the one that is not shown."""
    out = {}
    for i in range(len(batch.index)):
        source = visible(method, batch, i)[0]
        out[i] = source, 1 - source, draw(method, fused(method, batch, i, [source]), 1 - source)
    return out


def judged(method: Translator, batch: Batch, i: int, c: int, image: Tensor) -> Tensor:
    assert method.discriminator is not None
    shown = (
        torch.cat([batch.images[i : i + 1, DNA : DNA + 1], image], 1)
        if method.config.discriminator_sees_source
        else image
    )
    return method.discriminator(shown, torch.tensor([c]))


@pytest.mark.parametrize("sees_source", [False, True])
@pytest.mark.parametrize("kind", ["lsgan", "hinge", "bce"])
def test_both_players_are_scored_on_the_same_translations(
    kind: str, sees_source: bool, monkeypatch: pytest.MonkeyPatch, make: Make, two_stains: Tensor
) -> None:
    monkeypatch.setattr(translator, "rows_showing", lambda measured, c: measured[:, c].int().argmax(0))  # the first one
    method, batch = make(
        two_stains, {"adversarial": 0.3, "r1": 2.0}, adversarial=kind, discriminator_sees_source=sees_source
    )
    expected = {i: f for i, f in fakes(method, batch).items() if f[0] == DNA or not sees_source}
    assert len(expected) == (7 if sees_source else 9)
    fake = torch.stack([judged(method, batch, i, t, x) for i, (_, t, x) in expected.items()])
    goal = {"lsgan": (fake - 1).square(), "hinge": -fake, "bce": -torch.sigmoid(fake).log()}[kind].mean()
    assert method.loss(batch, "generator").total.item() == pytest.approx(0.3 * goal.item(), rel=1e-4)

    method.turn("discriminator")
    terms = method.loss(batch, "discriminator")
    first = {0: 0, 1: 0}  # the first cell that shows each marker
    real, slopes = [], []
    for _, target, _ in expected.values():
        image = batch.images[first[target]][target][None, None].clone().requires_grad_()
        real.append(judged(method, batch, first[target], target, image))
        (slope,) = torch.autograd.grad(real[-1].sum(), image, retain_graph=True)
        slopes.append(0.5 * slope.square().sum())
    r = torch.stack(real)
    game = {
        "lsgan": 0.5 * ((r - 1).square().mean() + fake.square().mean()),
        "hinge": F.relu(1 - r).mean() + F.relu(1 + fake).mean(),
        "bce": -0.5 * (torch.sigmoid(r).log().mean() + torch.sigmoid(-fake).log().mean()),
    }[kind]
    assert terms.parts["adversarial"].item() == pytest.approx(game.item(), rel=1e-4)
    assert terms.parts["r1"].item() == pytest.approx(2 * mean(slopes), rel=1e-4)
    assert terms.total.item() == pytest.approx(game.item() + 2 * mean(slopes), rel=1e-4)
    middle = 0.5 if kind == "lsgan" else 0.0
    right = ((r > middle).float().mean() + (fake < middle).float().mean()) / 2
    assert terms.parts["accuracy"].item() == pytest.approx(right.item())


def test_cycle_is_the_source_drawn_from_its_translation(make: Make, two_stains: Tensor) -> None:
    method, batch = make(two_stains, {"cycle": 0.7})
    each = []
    for i, (source, target, image) in fakes(method, batch).items():
        again = method.network.encode(image, torch.tensor([target]))
        each.append((draw(method, again.shared, source) - batch.images[i, source]).abs().mean())
    assert method.loss(batch, "generator").total.item() == pytest.approx(0.7 * mean(each), rel=1e-4)


def test_translations_leave_the_statistics_that_real_stains_are_predicted_by(make: Make, two_stains: Tensor) -> None:
    terms = ("patch_nce", "cycle", "patch_nce_identity")
    before, batch = make(two_stains, {"full": 1.0})
    states = []
    for weights in ({}, dict.fromkeys(terms, 1.0)):
        method, _ = make(two_stains, {"full": 1.0, "adversarial": 1.0, **weights})
        method.network.load_state_dict(before.network.state_dict())
        method.train()
        method.loss(batch, "generator")
        states.append(method.network.encoders.state_dict())
    fresh = before.network.encoders.state_dict()
    running = [name for name in fresh if "running" in name]
    assert running
    assert not any(torch.equal(states[0][name], fresh[name]) for name in running)
    for name in running:
        torch.testing.assert_close(states[1][name], states[0][name])


@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_patch_nce_finds_each_patch_in_the_source(negatives: str, make: Make, two_stains: Tensor) -> None:
    method, batch = make(two_stains, {"patch_nce": 0.7}, negatives=negatives, temperature=0.2, patches=999)
    pairs = [
        (method.network.encode(image, torch.tensor([target])).shared, maps(method, batch, i, source).shared)
        for i, (source, target, image) in fakes(method, batch).items()
    ]
    assert method.loss(batch, "generator").total.item() == pytest.approx(0.7 * contrast(method, pairs), rel=1e-4)


# --- what is computed, and what moves -------------------------------------------------------------------------------


def test_the_sharp_output_is_the_mean_and_texture_and_is_scored_where_it_is_known(
    make: Make, three_stains: Tensor
) -> None:
    method, batch = make(three_stains, {"cross": 1.0, "sharp": 0.7, "adversarial": 1.0})
    torch.manual_seed(3)
    parts = method.loss(batch, "generator").parts
    kept = method._kept
    assert kept is not None
    each = []
    for i, c, image in zip(kept.cells.tolist(), kept.channels.tolist(), kept.images, strict=True):
        shared = fused(method, batch, i, [DNA])
        assert method.network.texture is not None
        texture = method.network.texture(
            method.network.texture.path(shared), method.network.marker.weight[c][None], torch.tensor([c])
        )
        torch.testing.assert_close(image[None], draw(method, shared, c) + less_wide(texture), rtol=1e-4, atol=1e-5)
        if batch.measured[i, c]:
            each.append((image[0] - batch.images[i, c]).square().mean())
    assert 0 < len(each) < len(kept.cells)
    assert parts["sharp"].item() == pytest.approx(0.7 * mean(each), rel=1e-4)
    prediction = method.translate(batch.images, torch.ones_like(batch.measured) & batch.measured, [0])
    assert prediction.sharp is not None
    assert not torch.equal(prediction.sharp(), prediction.mean)


@pytest.mark.parametrize("kind", ["infonce", "triplet"])
def test_a_cell_that_a_batch_holds_twice_is_not_its_own_stranger(kind: str, make: Make, three_stains: Tensor) -> None:
    method, batch = make(three_stains, {"agreement": 1.0}, agreement=kind)
    rows = torch.tensor([*range(20), 0, 1, 2, 2])
    twice = Batch(batch.index[rows], batch.images[rows], batch.measured[rows])
    once = method.loss(batch, "generator").parts["agreement"]
    torch.testing.assert_close(method.loss(twice, "generator").parts["agreement"], once, rtol=1e-5, atol=1e-6)
