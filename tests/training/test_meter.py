"""Means of loss terms between two reports."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from imgshared.training.meter import MEASURE, Meter
from imgshared.types import LossTerms

ALONE: Any = SimpleNamespace(world_size=1)


def terms(total: float, **parts: float) -> LossTerms:
    return LossTerms(
        torch.tensor(total, requires_grad=True), {name: torch.tensor(value) for name, value in parts.items()}
    )


def test_a_term_is_averaged_over_the_batches_that_have_it() -> None:
    meter = Meter()
    meter.add(terms(1.0, full=4.0), weight=1)
    meter.add(terms(5.0, full=8.0, cross=2.0), weight=3)
    values = meter.take(ALONE)[2]
    want = {"loss": 4, "full": 7, "cross": 2, MEASURE: 4}
    assert values == {name: pytest.approx(value) for name, value in want.items()}


def test_players_are_told_apart() -> None:
    meter = Meter()
    for _ in range(2):
        meter.add(terms(1.0, adversarial=2.0))
        meter.add(terms(3.0, adversarial=4.0), "discriminator/")
        meter.step(16)
    steps, cells_per_s, values = meter.take(ALONE)
    assert steps == 2
    assert cells_per_s > 0
    named = {"loss": 1, "adversarial": 2, "discriminator/loss": 3, "discriminator/adversarial": 4}
    assert values == {**named, MEASURE: -1}  # the loss without what is no measure of success


def test_a_term_that_joins_late_is_taken_off_where_it_was() -> None:
    meter = Meter()
    meter.add(terms(0.3))
    meter.add(terms(0.8, adversarial=0.5))
    assert meter.take(ALONE)[2][MEASURE] == pytest.approx(0.3)


def test_it_begins_anew_after_each_report_and_half_precision_adds_up() -> None:
    meter = Meter()
    meter.add(terms(9.0))
    meter.step(1)
    meter.take(ALONE)
    assert meter.take(ALONE)[::2] == (0, {})
    for _ in range(1000):
        meter.add(LossTerms(torch.tensor(1.0, dtype=torch.bfloat16), {}))
    assert meter.take(ALONE)[2]["loss"] == 1.0  # a bfloat16 sum would stop at 256


def test_a_batch_in_which_nothing_could_be_judged_adds_nothing() -> None:
    """Neither a loss of 0, which would look like success, nor a step that no player took."""
    meter = Meter()
    nothing = LossTerms(torch.tensor(0.0), {}, count=0)
    meter.add(nothing)
    meter.add(nothing, "discriminator/")
    meter.step(16)
    assert meter.take(ALONE)[::2] == (1, {})
    meter.add(nothing)
    meter.add(terms(3.0))
    assert meter.take(ALONE)[2] == {"loss": 3.0, MEASURE: 3.0}


def test_means_of_a_whole_epoch_weigh_every_batch_alike_however_often_it_is_reported() -> None:
    meter = Meter()
    for batch in (terms(1.0, l1=1.0), terms(2.0, l1=2.0, nce=4.0)):
        meter.add(batch)
    meter.take(ALONE)
    meter.add(terms(9.0, nce=8.0))
    assert meter.take(ALONE)[2]["loss"] == 9.0
    meter.take(ALONE)  # nothing new
    assert meter.take_whole() == {"loss": 4.0, "l1": 1.5, "nce": 6.0}
    assert meter.take_whole() == {}
