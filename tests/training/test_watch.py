"""What is watched: the spread of predictions between cells, pictures, signs of collapse. Without any training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from imgshared.data.feed import Feed
from imgshared.data.normalise import Normaliser
from imgshared.data.panel import Panel
from imgshared.data.store import CellStore
from imgshared.methods.base import Method
from imgshared.training.watch import CAPTION, CELLS, GAP, LEAST, Watch, collapsed, find_cells
from imgshared.types import Batch, LossTerms, Prediction

PANEL = Panel(("P0", "DNA", "P2", "P3"), "DNA")
SIDE = (12, 10)
ZOOM = 7  # of so small crops: to 64 px across, at least
HIGH, ACROSS = SIDE[0] * ZOOM, SIDE[1] * ZOOM


class Fake(Method):
    """Predicts what a function of (images, measured, targets) says."""

    stages = ()  # type: ignore[assignment]

    def __init__(self, says: Callable[[Tensor, Tensor, Sequence[int]], Tensor]) -> None:
        super().__init__()
        self.says = says

    def loss(self, batch: Batch, player: str) -> LossTerms:
        raise NotImplementedError

    validate = loss  # type: ignore[assignment]

    def translate(self, images: Tensor, measured: Tensor, targets: Sequence[int]) -> Prediction:
        return Prediction(self.says(images, measured, targets))


def cells(n: int = 20) -> Batch:
    torch.manual_seed(0)
    measured = torch.ones(n, 4, dtype=torch.bool)
    measured[::3, 2] = False
    measured[1:, 3] = False  # in one cell alone: no spread
    measured[4, 1] = False  # without chromatin
    return Batch(torch.arange(n), torch.rand(n, 4, *SIDE) * measured[..., None, None], measured)


def watching(folder: Path, batch: Batch | None = None, sources: Sequence[int] = (1,)) -> Watch:
    return Watch(batch or cells(), sources, PANEL, folder)


def the_truth(images: Tensor, measured: Tensor, targets: Sequence[int]) -> Tensor:
    return images[:, targets]


def a_constant(images: Tensor, measured: Tensor, targets: Sequence[int]) -> Tensor:
    return torch.rand(1, len(targets), *SIDE).expand(len(images), -1, -1, -1)


def test_the_spread_of_the_truth_is_one_and_of_a_constant_zero(tmp_path: Path) -> None:
    watch = watching(tmp_path / "samples")
    spread, _ = watch.look(Fake(the_truth), 1)
    assert spread == {"diversity/P0": pytest.approx(1), "diversity/P2": pytest.approx(1)}
    spread, _ = watch.look(Fake(a_constant), 2)
    assert spread == {"diversity/P0": pytest.approx(0, abs=1e-6), "diversity/P2": pytest.approx(0, abs=1e-6)}
    spread, _ = watch.look(Fake(lambda x, m, t: 0.25 * x[:, t] + 3), 3)
    assert spread["diversity/P2"] == pytest.approx(0.25, rel=1e-4)


def test_the_spread_is_of_the_cells_that_have_the_stain(tmp_path: Path) -> None:
    batch = cells()
    known = batch.measured[:, 1] & batch.measured[:, 2]
    real = batch.images[known, 2].std(0).mean()

    def says(images: Tensor, measured: Tensor, targets: Sequence[int]) -> Tensor:
        return images[:, [1] * len(targets)]

    spread, _ = watching(tmp_path / "samples", batch).look(Fake(says), 1)
    assert spread["diversity/P2"] == pytest.approx((batch.images[known, 1].std(0).mean() / real).item(), rel=1e-5)


def test_only_the_sources_of_whole_cells_are_given(tmp_path: Path) -> None:
    asked: list[Any] = []

    def says(images: Tensor, measured: Tensor, targets: Sequence[int]) -> Tensor:
        asked.append((len(images), measured, list(targets)))
        return images[:, targets]

    watching(tmp_path / "samples", sources=(1, 2)).look(Fake(says), 1)
    n, measured, targets = asked[0]
    both = cells().measured[:, [1, 2]].all(1)
    assert n == both.sum()
    assert measured.tolist() == [[False, True, True, False]] * n
    assert targets == [0]


def test_the_picture_holds_a_row_a_cell_and_what_is_predicted_beside_the_real_stain(tmp_path: Path) -> None:
    batch = cells()
    _, picture = watching(tmp_path / "samples", batch).look(Fake(lambda x, m, t: 1 - x[:, t]), 340)
    assert picture is not None
    assert picture.shape == (2 * CAPTION + 6 * (HIGH + GAP), 5 * (ACROSS + GAP))  # DNA, and P0 and P2 twice
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "0000340.png")), picture)
    found = []
    for row in range(6):
        top = CAPTION + row * (HIGH + GAP)
        dna, p0, p0_predicted, p2, p2_predicted = (
            picture[top : top + HIGH : ZOOM, left : left + ACROSS : ZOOM]
            for left in range(0, 5 * (ACROSS + GAP), ACROSS + GAP)
        )
        shades = (batch.images * 255).byte().numpy()
        (cell,) = [i for i in range(20) if (shades[i, 1] == dna).all()]
        assert (p0 == shades[cell, 0]).all()
        assert (p2 == shades[cell, 2]).all()
        for real, predicted in ((p0, p0_predicted), (p2, p2_predicted)):
            assert np.abs(255 - real.astype(int) - predicted).max() <= 1
        found.append(cell)
    assert batch.measured[found][:, [0, 1, 2]].all()  # the cells that show most
    assert found == sorted(set(found))


def test_where_panels_differ_each_stain_is_shown_by_some_row() -> None:
    measured = torch.tensor([[True, True, True, False]] * 12 + [[False, True, False, True]] * 4)
    batch = Batch(torch.arange(16), torch.rand(16, 4, 64, 64) * measured[..., None, None], measured)
    _, picture = Watch(batch, (1,), PANEL, None).look(Fake(the_truth), 1)
    assert picture is not None
    real = [picture[CAPTION:-CAPTION, k * (64 + GAP) : k * (64 + GAP) + 64] for k in (1, 3, 5)]
    rows = [[image[y : y + 64].any() for y in range(0, 6 * (64 + GAP), 64 + GAP)] for image in real]
    assert [sum(map(bool, stain)) for stain in rows] == [4, 4, 2]


def test_what_is_beyond_the_contrast_is_clipped(tmp_path: Path) -> None:
    _, picture = watching(tmp_path / "samples").look(Fake(lambda x, m, t: x[:, t] * 0 + 7.0), 1)
    assert picture is not None
    assert (picture[CAPTION : CAPTION + HIGH, 2 * (ACROSS + GAP) : 3 * (ACROSS + GAP) - GAP] == 255).all()


@pytest.mark.parametrize(("side", "size", "px"), [(10, 0.5, 2 * ZOOM), (10, None, 2 * ZOOM), (LEAST, 0.25, 20)])
def test_below_the_pictures_is_a_scale_bar(tmp_path: Path, side: int, size: float | None, px: int) -> None:
    batch = cells()
    wide = Batch(batch.index, torch.rand(20, 4, side, side), batch.measured)
    _, picture = Watch(wide, (1,), PANEL, None, size).look(Fake(the_truth), 1)
    assert picture is not None
    assert int((picture[-CAPTION // 2] == 255)[1:].argmin()) == px


def test_where_there_is_nothing_to_watch_nothing_is_written(tmp_path: Path) -> None:
    none = cells()
    without = Batch(none.index, none.images, none.measured & torch.tensor([True, False, True, True]))
    for batch in (None, without, Batch(none.index[:1], none.images[:1], none.measured[:1])):
        assert Watch(batch, (1,), PANEL, tmp_path / "samples").look(Fake(the_truth), 1) == ({}, None)
    assert not list(tmp_path.iterdir())


def test_collapse_is_said_by_name() -> None:
    assert collapsed({"diversity/P0": 0.06, "diversity/P2": 0.8}, "DNA") == {}
    (said,) = collapsed({"diversity/P0": 0.01, "diversity/P2": 0.8}, "P2").values()
    assert said.startswith("predicted P0 hardly differs between cells (1% of the real spread)")
    assert said.endswith("nothing of it can be told from P2")  # whatever the source, not always chromatin


def test_two_stains_of_like_names_are_two_troubles() -> None:
    assert len(collapsed({"diversity/CD3 (a)": 0.01, "diversity/CD3 (b)": 0.01}, "DNA")) == 2


def test_stains_of_other_cells_are_watched_where_none_shows_both(tmp_path: Path) -> None:
    batch = cells()
    measured = batch.measured.clone()
    measured[:10, 2:], measured[10:, 1] = False, False  # the sources in one half, the stain in the other
    unpaired = Batch(batch.index, batch.images * measured[..., None, None], measured)
    spread, picture = watching(tmp_path, unpaired).look(Fake(lambda x, m, t: x[:, [1] * len(t)]), 3)
    assert picture is not None
    assert spread["diversity/P2"] == pytest.approx(1.0, abs=0.2)  # both halves are noise of one kind
    constant, _ = watching(tmp_path, unpaired).look(Fake(a_constant), 4)
    assert collapsed(constant, "DNA")


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    spread, picture = Watch(cells(), (1,), PANEL, None).look(Fake(the_truth), 1)
    assert picture is not None
    assert spread
    assert list(tmp_path.iterdir()) == []


TOY = Panel(("DNA", "P1", "P2"), "DNA")
NORMALISER = Normaliser("linear", 5.0, (0.0,) * 3, (1000.0,) * 3)


def feeds(store: CellStore, held_out: Sequence[Sequence[int]], training: Sequence[Sequence[int]]) -> tuple[Feed, Feed]:
    """Feeds of cells that show the stains marked, a row a cell."""
    made, first = [], 0
    for shows in (held_out, training):
        stained = np.array(shows, bool).reshape(len(shows), 3)
        cells = np.arange(first, first + len(shows))
        made.append(
            Feed(
                store, cells, [0, 1, 2], NORMALISER, torch.device("cpu"), "memory", 8, stained=stained, rank=1, world=2
            )
        )
        first += len(shows)
    return made[0], made[1]


def watched(held_out: Feed, training: Feed) -> tuple[Watch, list[str]]:
    batch, stand_in = find_cells(held_out, training, (0,), TOY)
    return Watch(batch, (0,), TOY, None), stand_in


def shown(batch: Batch | None) -> list[list[int]]:
    assert batch is not None
    return sorted(batch.measured.int().tolist())


def test_each_stain_is_looked_for_among_the_held_out_cells(toy: CellStore) -> None:
    """P2, in two of 72 cells, would be missed by cells at even distances."""
    rare = [[1, 1, 0]] * 72
    rare[33] = rare[34] = [1, 1, 1]
    batch, stand_in = find_cells(*feeds(toy, rare, [[1, 1, 1]] * 8), (0,), TOY)
    assert stand_in == []
    assert len(shown(batch)) == CELLS
    assert shown(batch).count([1, 1, 1]) == 2
    watch = Watch(batch, (0,), TOY, None)
    assert watch.targets == [1, 2]
    assert watch.blind is None


def test_training_cells_stand_in_for_a_side_that_no_held_out_cell_shows(toy: CellStore) -> None:
    both = [[1, 0, 0]] * 10 + [[0, 1, 1]] * 10
    for side, missing in (([[1, 0, 0]] * 5, ["P1", "P2"]), ([[0, 1, 1]] * 5, ["DNA"]), ([], ["P1", "P2", "DNA"])):
        watch, stand_in = watched(*feeds(toy, side, both))
        assert stand_in == missing
        assert watch.targets == [1, 2]
        spread, picture = watch.look(Fake(lambda x, m, t: x[:, [0] * len(t)]), 1)
        assert spread.keys() == {"diversity/P1", "diversity/P2"}
        assert picture is not None


def test_held_out_cells_that_show_a_stain_go_before_training_cells_that_show_it_beside_the_source(
    toy: CellStore,
) -> None:
    batch, stand_in = find_cells(*feeds(toy, [[1, 0, 0], [0, 1, 1]] * 5, [[1, 1, 1]] * 10), (0,), TOY)
    assert stand_in == []
    assert shown(batch) == [[0, 1, 1]] * 5 + [[1, 0, 0]] * 5


def test_what_counts_as_unstained_is_not_looked_at(toy: CellStore) -> None:
    batch, _ = find_cells(*feeds(toy, [[1, 1, 0]] * 6, [[1, 1, 0]] * 6), (0,), TOY)
    assert batch is not None
    assert not batch.images[:, 2].any()


def test_what_cannot_be_watched_is_said(toy: CellStore) -> None:
    watch, stand_in = watched(*feeds(toy, [[1, 1, 0]] * 6, [[1, 1, 0], [1, 1, 1]]))
    assert stand_in == []
    assert watch.blind is not None
    assert watch.blind.startswith("P2 cannot be watched, neither in pictures nor for mode collapse: too few cells")
    watch, _ = watched(*feeds(toy, [[0, 1, 1]] * 6, [[1, 1, 1]] + [[0, 1, 1]] * 4))
    assert watch.blind is not None
    assert watch.blind.startswith("P1, P2 cannot be watched")
    assert "DNA" in watch.blind
    assert watch.look(Fake(the_truth), 1) == ({}, None)
