"""The random choices of a step, over many seeds: what must hold in each, and what must hold on average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imgshared.methods.draws import (
    Stains,
    at_most,
    draw_targets,
    few,
    first_of_each,
    list_stains,
    rows_showing,
    show,
    some,
)

CHROMATIN = 2
SEEDS = range(60)


def some_cells(seed: int, cells: int = 40, markers: int = 6) -> Tensor:
    """Measured stains of cells that have at least one, some of them without chromatin."""
    generator = torch.Generator().manual_seed(seed)
    measured = torch.rand(cells, markers, generator=generator) < 0.5
    measured[:10] = False  # unpaired: one stain each
    measured[:10, torch.randint(0, markers, (1,), generator=generator).item()] = True
    measured[~measured.any(1), CHROMATIN] = True
    return measured


def all_of(measured: Tensor) -> Stains:
    return list_stains(measured, torch.zeros_like(measured), CHROMATIN)


def listed(stains: Stains) -> list[tuple[int, int]]:
    return list(zip(stains.cells.tolist(), stains.channels.tolist(), strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_stains_are_listed_once_cell_by_cell_chromatin_first(seed: int) -> None:
    measured = some_cells(seed)
    stains = all_of(measured)
    assert sorted(listed(stains)) == [(i, c) for i, c in measured.nonzero().tolist()]
    assert stains.cells.diff().ge(0).all()
    for i in range(len(measured)):
        channels = stains.channels[stains.cells == i].tolist()
        assert channels == sorted(channels, key=lambda c: (c != CHROMATIN, c))
    assert stains.visible.all()


def test_at_most_keeps_of_each_row_so_many_true_values_evenly() -> None:
    torch.manual_seed(0)
    mask = torch.rand(4000, 5) < 0.6
    for limit in (1, 2, 7, None):
        kept = at_most(mask, limit)
        assert not (kept & ~mask).any()
        assert torch.equal(kept.sum(1), mask.sum(1).clamp_max(limit or 5))
    kept = at_most(torch.ones(4000, 5, dtype=torch.bool), 2).float().mean(0)
    assert (kept - 0.4).abs().max() < 0.03


def test_the_list_tells_visible_from_hidden() -> None:
    for seed in SEEDS:
        measured = some_cells(seed)
        visible = measured & (torch.rand(measured.shape) < 0.5)
        hidden = measured & ~visible & (torch.rand(measured.shape) < 0.5)
        stains = list_stains(visible, hidden, CHROMATIN)
        assert torch.equal(stains.mask(40, 6, stains.visible), visible)
        assert torch.equal(stains.mask(40, 6, ~stains.visible), hidden)
        assert stains.cells.diff().ge(0).all()


@pytest.mark.parametrize("proteins", [1, 2, None])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chromatin_only", [0.0, 0.5, 1.0])
def test_every_cell_shows_something(chromatin_only: float, share: float, proteins: int | None) -> None:
    for seed in SEEDS[:30]:
        torch.manual_seed(seed)
        measured = some_cells(seed)
        shown = show(measured, CHROMATIN, chromatin_only=chromatin_only, hide=share, proteins=proteins)
        assert not (shown & ~measured).any()
        assert shown.any(1).all()
        others = shown.clone()
        others[:, CHROMATIN] = False
        assert others.sum(1).max() <= (proteins or 6)
        both = measured[:, CHROMATIN] & (measured.sum(1) > 1)
        if chromatin_only == 1:
            assert shown[both].nonzero()[:, 1].eq(CHROMATIN).all()
        if share == 0 and chromatin_only == 0:
            assert torch.equal(shown[:, CHROMATIN], measured[:, CHROMATIN])
            assert proteins is not None or torch.equal(shown, measured)
        if share == 1 and chromatin_only == 0:
            assert shown.sum(1).eq(1).all()


def test_hiding_has_the_shares_that_are_asked_for() -> None:
    torch.manual_seed(0)
    measured = torch.ones(8000, 3, dtype=torch.bool)

    def shares(chromatin_only: float, hide: float, proteins: int | None = None) -> Tensor:
        shown = show(measured, CHROMATIN, chromatin_only=chromatin_only, hide=hide, proteins=proteins)
        return torch.cat([(shown.sum(1) == 1).float().mean()[None], shown.float().mean(0)])

    assert shares(0.3, 0.0)[0].item() == pytest.approx(0.3, abs=0.02)
    # One stays where all three would go: 1 - h + h^3 / 3 each.
    assert (shares(0.0, 0.5)[1:] - (0.5 + 0.125 / 3)).abs().max() < 0.02
    assert (shares(0.0, 1.0)[1:] - 1 / 3).abs().max() < 0.02
    assert (shares(0.0, 0.0, 1)[1:] - torch.tensor([0.5, 0.5, 1.0])).abs().max() < 0.02


def test_cells_without_any_stain_show_none() -> None:
    measured = torch.zeros(3, 2, dtype=torch.bool)
    measured[1] = True
    stains = list_stains(measured, torch.zeros_like(measured), 0)
    assert listed(stains) == [(1, 0), (1, 1)]
    shown = show(measured, 0, chromatin_only=0.0, hide=1.0, proteins=None)
    assert shown.sum(1).tolist() == [0, 1, 0]
    assert draw_targets(measured, shown)[0].tolist() == [1]
    none = list_stains(*torch.zeros(2, 3, 2, dtype=torch.bool), 0)
    assert [len(x) for x in (*none, *none.pairs())] == [0] * 5


def test_the_first_visible_stain_is_chromatin_where_it_is_visible() -> None:
    for seed in SEEDS:
        torch.manual_seed(seed)
        measured = some_cells(seed)
        shown = show(measured, CHROMATIN, chromatin_only=0.3, hide=0.5, proteins=2)
        stains = list_stains(shown, measured & ~shown, CHROMATIN)
        first = stains.first_visible(40)
        assert torch.equal(stains.cells[first], torch.arange(40))
        assert stains.visible[first].all()
        assert torch.equal(stains.channels[first] == CHROMATIN, shown[:, CHROMATIN])


def test_pairs_are_of_one_cell_its_first_stain_and_any_other() -> None:
    met = set()
    for seed in SEEDS:
        torch.manual_seed(seed)
        measured = some_cells(3)
        stains = all_of(measured)
        one, other = stains.pairs()
        assert torch.equal(stains.cells[one], stains.cells[other])
        assert stains.cells[one].tolist() == (measured.sum(1) > 1).nonzero()[:, 0].tolist()  # once each
        assert torch.equal(stains.channels[one] == CHROMATIN, measured[stains.cells[one], CHROMATIN])
        assert (other > one).all()
        met |= set(zip(stains.cells[one].tolist(), stains.channels[other].tolist(), strict=True))
    firsts = {(i, c) for i, c in zip(stains.cells[one].tolist(), stains.channels[one].tolist(), strict=True)}
    everything = {(i, c) for i, c in measured.nonzero().tolist() if measured[i].sum() > 1}
    assert met == everything - firsts  # in time every stain takes part


def test_targets_are_shown_by_no_one_but_known_to_the_batch() -> None:
    for seed in SEEDS:
        torch.manual_seed(seed)
        measured = some_cells(seed) & (torch.arange(6) != 4)  # a marker that no cell has
        measured[~measured.any(1), CHROMATIN] = True
        shown = show(measured, CHROMATIN, chromatin_only=0.5, hide=0.5, proteins=2)
        shown[:5] = False
        cells, channels = draw_targets(measured, shown)
        assert not shown[cells, channels].any()
        assert measured.any(0)[channels].all()
        able = shown.any(1) & (measured.any(0) & ~shown).any(1)
        assert cells.tolist() == able.nonzero()[:, 0].tolist()


def test_targets_are_drawn_evenly() -> None:
    torch.manual_seed(0)
    measured = torch.ones(6000, 4, dtype=torch.bool)
    shown = torch.zeros_like(measured)
    shown[:, 0] = True
    counts = torch.bincount(draw_targets(measured, shown)[1], minlength=4) / 6000
    assert counts[0] == 0
    assert (counts[1:] - 1 / 3).abs().max() < 0.025


def test_real_stains_come_from_cells_that_have_them_each_as_often() -> None:
    for seed in SEEDS:
        torch.manual_seed(seed)
        measured = some_cells(seed)
        channels = torch.randint(0, 6, (50,))
        channels = channels[measured.any(0)[channels]]
        assert measured[rows_showing(measured, channels), channels].all()
    measured = torch.tensor([[True, False], [True, True], [False, True], [True, False]])
    rows = rows_showing(measured, torch.zeros(6000, dtype=torch.long))
    counts = torch.bincount(rows, minlength=4) / 6000
    assert counts[2] == 0
    assert (counts[[0, 1, 3]] - 1 / 3).abs().max() < 0.025
    assert rows_showing(measured, torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize(("n", "share", "kept"), [(10, 0.5, 5), (10, 1.0, 10), (3, 0.1, 1), (1, 0.0, 1), (0, 0.5, 0)])
def test_some_of_the_rows_are_drawn_once_each(n: int, share: float, kept: int) -> None:
    rows = torch.arange(n) + 7
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = some(rows, share)
        assert len(drawn) == len(set(drawn.tolist())) == kept
        assert set(drawn.tolist()) <= set(rows.tolist())
    if share == 1:
        assert torch.equal(drawn, rows)


def test_every_row_has_its_turn() -> None:
    torch.manual_seed(0)
    seen = torch.cat([some(torch.arange(8), 0.25) for _ in range(200)])
    assert torch.bincount(seen, minlength=8).min() > 25  # of 50 expected


def test_few_rows_are_drawn_without_repeats_and_all_stay_in_order() -> None:
    rows = torch.arange(9) * 3
    for limit in (None, 9, 20):
        assert torch.equal(few(rows, limit), rows)
    drawn = [few(rows, 4) for _ in SEEDS]
    assert all(len(set(d.tolist())) == 4 for d in drawn)
    assert {x for d in drawn for x in d.tolist()} == set(rows.tolist())


def test_the_first_of_each_kind() -> None:
    assert first_of_each(torch.tensor([3, 5, 3, 3, 5, 1])).tolist() == [True, True, False, False, False, True]
    assert first_of_each(torch.zeros(0)).tolist() == []
