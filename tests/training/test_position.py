"""When a loss has run away, and when it only began."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from imgshared.training.position import Position


def diverged(values: Sequence[float], names: Sequence[str] = ("l1",), factor: float = 10.0) -> list[bool]:
    at = Position()
    return [at.diverges(value, names, factor) for value in values]


def test_what_grows_far_beyond_its_best_has_run_away() -> None:
    assert diverged([1.0, 0.5, 2.0, 1.0]) == [False] * 4
    assert diverged([1.0, 200.0]) == [False, True]
    assert diverged([-3.0, -3.5, -3.0]) == [False] * 3  # a log-likelihood may be below zero
    assert diverged([-3.0, 400.0]) == [False, True]


@pytest.mark.parametrize("zeros", [1, 4])
def test_a_loss_that_begins_at_zero_has_no_size_yet(zeros: int) -> None:
    assert not any(diverged([0.0] * zeros + [0.04, 0.05, 0.03]))
    assert diverged([0.0] * zeros + [0.04, 9.0]) == [False] * (zeros + 1) + [True]


def test_a_loss_may_reach_zero() -> None:
    assert not any(diverged([1.0, 0.0, 0.0, 0.1]))


def test_a_new_term_begins_anew() -> None:
    at = Position()
    assert not at.diverges(0.01, ["l1"], 10)
    assert not at.diverges(5.0, ["l1", "nce"], 10)
    assert at.diverges(999.0, ["l1"], 10)  # one that is missing now and then does not
