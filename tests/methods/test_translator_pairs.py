"""What the translator learns from cells that were, and were not, stained together, and how it is judged on both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from imgshared.methods.translator import Translator
from imgshared.types import Batch, InputError

DNA = 1
Make = Callable[..., tuple[Translator, Batch]]


@pytest.mark.parametrize("term", ["cross", "agreement", "sharp"])
def test_terms_of_pairs_are_refused_without_pairs(term: str, make_translator: Make, never_together: Tensor) -> None:
    with pytest.raises(InputError) as refused:
        make_translator({"weights": {term: 0.1}}, measured=never_together)
    assert f"method.weights.{term} needs cells with two stains" in str(refused.value)
    assert "configs/translator_unpaired.yaml" in str(refused.value)
    with pytest.raises(
        InputError,
        match=r"sees_source needs cells that show chromatin and another.*as configs/translator_unpaired.yaml",
    ):
        make_translator({"weights": {"adversarial": 1.0}, "discriminator_sees_source": True}, measured=never_together)


def test_cells_of_one_stain_each_are_refused_where_no_term_translates(
    make_translator: Make, never_together: Tensor
) -> None:
    with pytest.raises(
        InputError, match=r"no training cell has two stains and no term translates .*translator_unpaired"
    ):
        make_translator({"weights": {"full": 1.0, "shared": 0.1, "patch_nce_identity": 0.1}}, measured=never_together)
    for term in ("adversarial", "patch_nce", "cycle"):
        make_translator({"weights": {"full": 1.0, term: 0.1}}, measured=never_together)


def test_proteins_that_never_meet_chromatin_are_named_where_no_term_translates(make_translator: Make) -> None:
    apart = torch.tensor([[True, False, True]] * 5 + [[False, True, False]] * 5)  # proteins together, DNA alone
    method, _ = make_translator({"weights": {"full": 1.0, "cross": 1.0}}, measured=apart)
    said = method.doubts(apart, method.panel.markers)
    assert [s.partition(":")[0] for s in said] == ["P0", "P2"]
    translating = {"weights": {"full": 1.0, "cross": 1.0, "patch_nce": 1.0, "adversarial": 1.0}}
    assert make_translator(translating, measured=apart)[0].doubts(apart, method.panel.markers) == []


def test_a_stain_that_nothing_joins_with_chromatin_is_named(make_translator: Make) -> None:
    both, alone = [[True, True, False]] * 3, [[False, False, True]] * 2
    method, _ = make_translator({"weights": {"full": 1.0, "cross": 1.0}})
    markers = method.panel.markers
    (said,) = method.doubts(torch.tensor(both + alone), markers)
    assert said.startswith("P2: no training cell shows it beside DNA or a stain that others show beside DNA")
    assert "method.discriminator_sees_source=false" in said
    assert method.doubts(torch.tensor(both), markers) == []
    assert method.doubts(torch.tensor([*both, *alone, [True, False, True]]), markers) == []
    assert method.doubts(torch.tensor([*both, *alone, [False, True, True]]), markers) == []  # by way of P0
    translating = {
        "weights": {"full": 1.0, "cross": 1.0, "patch_nce": 1.0, "adversarial": 1.0},
        "discriminator_sees_source": False,
    }
    assert make_translator(translating)[0].doubts(torch.tensor(both + alone), markers) == []
    blind = make_translator({**translating, "discriminator_sees_source": True})[0]  # it would never judge P2
    assert blind.doubts(torch.tensor(both + alone), markers) == [said]


def test_specific_maps_that_nothing_teaches_to_draw_are_said(make_translator: Make) -> None:
    method, batch = make_translator({"weights": {"cross": 1.0}})
    (said,) = method.doubts(batch.measured, method.panel.markers)
    assert said.startswith("method.weights.full=0: nothing teaches to draw from specific maps")


def test_what_is_paired_shows_chromatin_and_another_stain(make_translator: Make) -> None:
    apart = torch.tensor([[True, False, True]] * 5 + [[False, True, False]] * 5)  # proteins together, DNA alone
    method, batch = make_translator({"weights": {"cross": 1.0, "agreement": 1.0}}, measured=apart)
    assert not method.paired
    assert not method.stages[0].monitored
    terms = method.validate(batch)
    assert (set(terms.parts), terms.count) == ({"full"}, 15)
    with pytest.raises(
        InputError,
        match=r"sees_source needs cells that show chromatin and another.*as configs/translator_unpaired.yaml",
    ):
        make_translator({"weights": {"adversarial": 1.0}, "discriminator_sees_source": True}, measured=apart)


def test_the_held_out_error_chooses_only_without_a_discriminator(make_translator: Make) -> None:
    assert make_translator()[0].stages[0].monitored
    assert not make_translator({"weights": {"cross": 1.0, "adversarial": 0.1}})[0].stages[0].monitored  # blur would win


def test_validation_asks_for_every_stain_from_chromatin(make_translator: Make) -> None:
    method, batch = make_translator({"error": "l1"})
    method.eval()
    only = torch.zeros_like(batch.measured)
    only[:, DNA] = True
    predicted = method.translate(batch.images, only, range(3)).mean
    pairs = batch.measured.clone()
    pairs[:, DNA] = False
    want = (predicted - batch.images)[pairs].abs().mean()
    terms = method.validate(batch)
    assert set(terms.parts) == {"cross"}
    assert terms.total.item() == pytest.approx(want.item(), rel=1e-5)
    assert terms.count == pairs.sum()


@pytest.mark.parametrize("paired", [True, False])
def test_a_held_out_batch_that_cannot_be_judged_does_not_count(
    paired: bool, make_translator: Make, never_together: Tensor
) -> None:
    method, batch = make_translator(
        {} if paired else {"weights": {"full": 1.0, "cycle": 1.0}}, measured=None if paired else never_together
    )
    keep = torch.arange(batch.measured.shape[1]) == DNA if paired else torch.zeros(2, dtype=torch.bool)
    terms = method.validate(replace(batch, measured=batch.measured & keep))
    assert (terms.total, terms.parts, terms.count) == (0, {}, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": {"patch_nce": 1.0, "adversarial": 1.0, "cycle": 1.0}, "translation_from": 0.5},
        {"weights": {"adversarial": 1.0}, "discriminator_sees_source": True},  # and no cell shows chromatin
    ],
)
def test_a_step_without_any_term_moves_nothing(settings: dict[str, Any], make_translator: Make) -> None:
    method, batch = make_translator(settings)
    without = torch.arange(3) != DNA
    for keep in (without, torch.zeros(3, dtype=torch.bool)):
        stands_still(method, replace(batch, measured=batch.measured & keep))


def stands_still(method: Translator, batch: Batch) -> None:
    for player in method.stages[0].groups:
        method.turn(player)
        method.zero_grad()
        terms = method.loss(batch, player)
        terms.total.backward()
        assert terms.total == 0
        assert not terms.parts
        assert all(not p.grad.any() for p in method.parameters() if p.requires_grad and p.grad is not None)


def test_a_share_of_the_stains_is_drawn_again_and_so_many_cells_are_translated(
    monkeypatch: pytest.MonkeyPatch, make_translator: Make
) -> None:
    everything = torch.ones(8, 3, dtype=torch.bool)
    drawn: list[int] = []
    for share in (1.0, 0.5, 0.25):
        config = {"weights": {"full": 1.0, "shared": 1.0, "adversarial": 1.0}, "chromatin_only": 1.0}
        method, batch = make_translator(
            {**config, "rebuilt": share, "translated": round(8 * share)}, measured=everything
        )
        decode = method.network.decode

        def spy(trunk: Tensor, *rest: Any, decode: Any = decode) -> Any:
            drawn.append(len(trunk))
            return decode(trunk, *rest)

        monkeypatch.setattr(method.network, "decode", spy)
        method.loss(batch, "generator").total.backward()
        assert drawn == [round(8 * share)] * 3  # full, shared, translated
        drawn.clear()
        method.turn("discriminator")
        assert set(method.loss(batch, "discriminator").parts) == {"adversarial", "accuracy"}
