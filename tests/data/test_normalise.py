import json

import numpy as np
import pytest
import torch

from imgshared.data.normalise import Normaliser, fit_normaliser
from imgshared.data.store import CellStore
from imgshared.types import InputError

TRANSFORMS = ("linear", "sqrt", "arcsinh")


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_inverse_undoes_forward_also_above_high_and_below_low(transform):
    normaliser = Normaliser(transform, 5.0, (1.0, 0.5), (4.0, 9.0))
    raw = torch.linspace(-50, 4000, 2 * 8 * 8).reshape(1, 2, 8, 8)
    x = normaliser.forward(raw)
    assert x.dtype == torch.float32
    assert x.max() > 1
    assert x.min() < 0
    torch.testing.assert_close(normaliser.inverse(x), raw, rtol=1e-5, atol=1e-4)


def test_forward_is_the_stated_formula():
    raw = torch.tensor([0.0, 4.0, 9.0, 100.0]).reshape(1, 1, 2, 2)
    x = raw.flatten().double().numpy()
    for transform, f in (("linear", x), ("sqrt", np.sqrt(x)), ("arcsinh", np.arcsinh(x / 2))):
        got = Normaliser(transform, 2.0, (0.25,), (1.5,)).forward(raw).flatten().numpy()
        np.testing.assert_allclose(got, (f - 0.25) / 1.25, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.float32])
def test_any_raw_dtype_becomes_float32(dtype):
    raw = torch.arange(16).reshape(1, 1, 4, 4).to(dtype)
    torch.testing.assert_close(Normaliser("linear", 5.0, (0.0,), (10.0,)).forward(raw), raw.float() / 10)


def test_bounds_are_percentiles_of_the_given_cells_where_measured(toy):
    cells = np.arange(40)
    normaliser = fit_normaliser(toy, cells, [0, 2], transform="sqrt", low=1, high=99)
    for i, channel in enumerate((0, 2)):
        pixels = np.sqrt(toy.images(cells[toy.measured[cells, channel]])[:, channel].astype(np.float32))
        np.testing.assert_allclose((normaliser.low[i], normaliser.high[i]), np.percentile(pixels, [1, 99]), rtol=1e-6)


def test_bounds_of_a_marker_depend_on_no_other_marker_and_a_cell_is_read_once(toy, monkeypatch):
    monkeypatch.setattr("imgshared.data.normalise.FIT_CELLS", 9)
    monkeypatch.setattr("imgshared.data.normalise.BLOCK", 4)
    cells = np.random.default_rng(3).permutation(80)
    read, images = [], CellStore.images
    monkeypatch.setattr(CellStore, "images", lambda store, rows: read.extend(rows) or images(store, rows))
    whole = fit_normaliser(toy, cells, [0, 1, 2])
    assert len(set(read)) == len(read)
    assert all(toy.measured[read, c].sum() >= 9 for c in range(3))
    assert len(read) < 27
    assert fit_normaliser(toy, cells, [2, 0]) == whole.select([2, 0])
    assert fit_normaliser(toy, cells, [2, 0], seed=1) != whole.select([2, 0])


def test_cells_that_do_not_train_change_nothing(tmp_path, toy, arrays, write_store):
    images, measured, masks, obs = arrays
    images[40:] = images[40:] * 7 + 3
    other = CellStore(write_store(tmp_path / "a.zarr", images, measured, masks, obs))
    cells = np.arange(40)
    assert fit_normaliser(other, cells, [0, 1, 2]) == fit_normaliser(toy, cells, [0, 1, 2])
    assert fit_normaliser(other, np.arange(80), [0]) != fit_normaliser(toy, np.arange(80), [0])


def test_unmeasured_and_constant_markers_are_named(tmp_path, arrays, write_store):
    images, measured, masks, obs = arrays
    images[:, 1] = 7
    store = CellStore(write_store(tmp_path / "a.zarr", images, measured, masks, obs))
    with pytest.raises(InputError, match="marker 'P1' is constant"):
        fit_normaliser(store, np.arange(80), [0, 1])
    with pytest.raises(InputError, match="marker 'P2' is measured in no training cell"):
        fit_normaliser(store, np.arange(0, 80, 2), [0, 2])


def test_chromatin_cannot_be_left_out(tmp_path, arrays, write_store):
    images, measured, masks, obs = arrays
    measured[:40, 0] = False
    images[:, 0] = 7
    store = CellStore(write_store(tmp_path / "a.zarr", images, measured, masks, obs))
    for cells, what in ((np.arange(40), "measured in no training cell"), (np.arange(40, 80), "constant")):
        with pytest.raises(InputError, match=f"'DNA' is {what}.*every panel keeps: change the split") as caught:
            fit_normaliser(store, cells, [0, 1])
        assert "leave it out" not in str(caught.value)


def test_sparse_counts_whose_percentile_is_background(tmp_path, arrays, write_store):
    images, measured, masks, obs = arrays
    images[:, 1] = 0
    images[3, 1, 5, 5] = 12
    store = CellStore(write_store(tmp_path / "a.zarr", images, measured, masks, obs))
    normaliser = fit_normaliser(store, np.arange(80), [1], high=90)
    assert (normaliser.low, normaliser.high) == ((0.0,), (12.0,))


def test_select_and_dict_round_trip():
    normaliser = Normaliser("arcsinh", 3.0, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert normaliser.select([2, 0]) == Normaliser("arcsinh", 3.0, (3.0, 1.0), (6.0, 4.0))
    assert Normaliser.from_dict(json.loads(json.dumps(normaliser.to_dict()))) == normaliser
    raw = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(normaliser.select([2]).forward(raw[:, [2]]), normaliser.forward(raw)[:, [2]])


def test_percentiles_the_wrong_way_round_are_refused(toy):
    with pytest.raises(InputError, match="low = 99 must be below"):
        fit_normaliser(toy, np.arange(80), [0], low=99, high=1)
