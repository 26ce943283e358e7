"""What the translator's terms compute, and which parts of it each of them moves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from imgshared.methods.translator import Translator
from imgshared.types import Batch

Make = Callable[..., tuple[Translator, Batch]]


@pytest.mark.parametrize(
    ("weights", "calls"),  # of encode (and how many stains), shared_path, own_detail, decode and the discriminator
    [
        (["cross"], (1, 20, 1, 0, 1, 0)),
        (["full"], (1, 20, 1, 1, 1, 0)),
        (["full", "shared", "cross", "norm"], (1, 20, 1, 1, 3, 0)),
        (["agreement", "independence"], (1, 37, 1, 0, 0, 0)),
        (["identity"], (1, 20, 2, 0, 1, 0)),
        (["adversarial"], (1, 20, 1, 0, 1, 1)),
        (["sharp", "adversarial"], (1, 20, 1, 0, 1, 1)),
        (["patch_nce"], (2, 40, 1, 0, 1, 0)),
        (["patch_nce_identity"], (2, 40, 2, 0, 1, 0)),
        (["cycle"], (2, 40, 2, 0, 2, 0)),
        (["adversarial", "patch_nce", "cycle"], (2, 40, 2, 0, 2, 1)),
    ],
)
def test_a_term_without_weight_is_not_computed(
    weights: list[str], calls: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, make: Make, three_stains: Tensor
) -> None:
    method, batch = make(three_stains, dict.fromkeys(weights, 1.0))
    seen: Counter[str] = Counter()

    def count(name: str) -> None:
        call = getattr(method.network, name)

        def counted(*args: Tensor) -> object:
            seen.update({name: 1, f"{name} of": len(args[0])})
            return call(*args)

        monkeypatch.setattr(method.network, name, counted)

    for name in ("encode", "decode", "own_detail"):
        count(name)
    method.network.shared_path.register_forward_hook(lambda *_: seen.update(["shared_path"]))
    assert (method.discriminator is None) == ("adversarial" not in weights)
    assert (method.projection is None) == (not {"patch_nce", "patch_nce_identity"} & set(weights))
    if method.discriminator:
        method.discriminator.register_forward_hook(lambda *_: seen.update(["judge"]))
    assert set(method.loss(batch, "generator").parts) == set(weights)
    assert tuple(seen[n] for n in ("encode", "encode of", "shared_path", "own_detail", "decode", "judge")) == calls


def test_a_term_is_the_same_whatever_else_is_on(make: Make, three_stains: Tensor) -> None:
    everything = dict.fromkeys(
        ("full", "shared", "cross", "norm", "identity", "adversarial", "patch_nce", "cycle"), 1.0
    )
    whole, batch = make(three_stains, everything)
    torch.manual_seed(1)
    parts = whole.loss(batch, "generator").parts
    for name in everything:
        alone, _ = make(three_stains, {name: 1.0})
        alone.load_state_dict({k: v for k, v in whole.state_dict().items() if k in alone.state_dict()})
        torch.manual_seed(1)
        assert alone.loss(batch, "generator").parts[name].item() == pytest.approx(parts[name].item(), rel=1e-5), name


READ = {"encoders"}


DRAWN = READ | {"marker", "shared_path", "absent", "head"}


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("full", READ | {"marker", "shared_path", "specific_path", "own", "head"}),  # not the code of an absent stain
        ("shared", DRAWN),
        ("cross", DRAWN),
        ("identity", DRAWN),
        ("agreement", READ | {"marker"}),  # proteins are read, by an encoder that is told which
        ("independence", READ | {"marker"}),
        ("norm", READ),
        ("kl", READ | {"log_std"}),
        ("cycle", DRAWN),
        ("adversarial", DRAWN),
        ("sharp", {"texture"}),  # the mean stays what it is
        ("patch_nce", DRAWN | {"projection"}),
        ("patch_nce_identity", DRAWN | {"projection"}),
    ],
)
def test_a_gradient_reaches_what_it_should_and_nothing_else(
    name: str, moved: set[str], make: Make, three_stains: Tensor
) -> None:
    fusion = {"fusion": "product"} if name == "kl" else {}
    contrasts = name.startswith("patch_nce")
    method, batch = make(three_stains, {name: 1.0} if contrasts else {name: 1.0, "adversarial": 0.5}, **fusion)
    parts: dict[str, Tensor] = {}
    method.weights = replace(
        method.weights, adversarial=0.5 * (name in ("adversarial", "sharp"))
    )  # the discriminator is there
    method.loss(batch, "generator").total.backward()
    for full_name, p in method.named_parameters():
        top = full_name.split(".")[0] if not full_name.startswith("network.") else full_name.split(".")[1]
        if p.grad is not None and p.grad.any():
            parts[top] = p.grad
    assert set(parts) == moved
    if name == "independence":  # both halves of every level
        blocks = [block for encoder in method.network.encoders for block in encoder.blocks]
        assert all(block.last.bias.grad.all() for block in blocks)


@pytest.mark.parametrize(
    ("term", "moved"),
    [
        ("adversarial", {"texture"}),  # whatever the discriminator says, the mean and the latents stay what they are
        ("patch_nce", {"texture"} | READ),
        ("cycle", {"texture"} | READ | {"marker", "shared_path", "head", "absent"}),  # which draws the source back
    ],
)
def test_beside_a_sharp_output_a_translation_term_moves_the_texture_and_what_reads_it(
    term: str, moved: set[str], make: Make, two_stains: Tensor
) -> None:
    method, batch = make(two_stains, {"sharp": 1.0, "adversarial": 1.0, term: 1.0})
    off = dict.fromkeys((f.name for f in fields(method.weights)), 0.0)
    method.weights = replace(method.weights, **{**off, "sharp": 1e-30, term: 1.0})
    method.loss(batch, "generator").total.backward()
    net = method.network
    assert {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()} == moved


def test_a_turn_moves_one_player(make: Make, three_stains: Tensor) -> None:
    weights = {"full": 1.0, "adversarial": 1.0, "r1": 1.0, "patch_nce": 1.0}
    method, batch = make(three_stains, weights, chromatin_only=0.0)
    stage = method.stages[0]
    assert list(stage.groups) == ["generator", "discriminator"]
    everything = {id(p) for groups in stage.groups.values() for g in groups for p in g.parameters}
    assert everything == {id(p) for p in method.parameters()}
    for player, mine in (("generator", ("network", "projection")), ("discriminator", ("discriminator",))):
        method.zero_grad()
        method.turn(player)
        method.loss(batch, player).total.backward()
        for name, p in method.named_parameters():
            assert (p.grad is not None) == (name.split(".")[0] in mine), name
    assert math.isfinite(sum(float(p.grad.sum()) for p in method.parameters() if p.grad is not None))
