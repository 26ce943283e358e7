"""An image looked at tile by tile is the image looked at whole."""

import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile

from imgshared.data import crops, scan
from imgshared.data.prepare import prepare
from imgshared.data.scan import Labelled, connected, labels_in
from imgshared.types import InputError

SHAPE = (300, 260)
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def cells():
    """Two channels, and labels of 60 discs, large numbers among them."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    mask = np.zeros(SHAPE, np.int32)
    for k, (cy, cx) in enumerate(rng.uniform(0, SHAPE, (60, 2))):
        mask[np.hypot(y - cy, x - cx) < 9] = 7 * k + 3 + 10**6 * (k % 5 == 0)
    return rng.poisson(100 + 400 * (mask > 0), (2, *SHAPE)).astype(np.uint16), mask


def tiled(monkeypatch, side):
    monkeypatch.setattr(scan, "SIDE", side)
    monkeypatch.setattr(crops, "SIDE", side)


def labelled(pixels, mask):
    return Labelled(lambda *at: pixels[:, *at], lambda *at: mask[at], mask.shape)


@pytest.mark.parametrize("side", [1000, 64, 77])
def test_a_scan_finds_what_the_whole_image_shows(cells, monkeypatch, side):
    tiled(monkeypatch, side)
    pixels, mask = cells
    found = scan.scan(labelled(pixels, mask), 1, stride=3)
    labels = np.unique(mask)[1:]
    assert found.table.index.tolist() == labels.tolist()
    for label, row in found.table.iterrows():
        y, x = (mask == label).nonzero()
        assert (row["area"], row["y"], row["x"]) == (len(y), y.sum(), x.sum())
        assert [row["sum_0"], row["sum_1"]] == pixels[:, y, x].sum(1).tolist()
        assert row["touches"] == bool(np.isin(0, [*y, *x]) or y.max() == SHAPE[0] - 1 or x.max() == SHAPE[1] - 1)
    assert found.table["touches"].any()
    np.testing.assert_array_equal(found.picture, pixels[1, ::3, ::3])
    np.testing.assert_array_equal(found.outlined, mask[::3, ::3])
    assert labels_in(lambda *at: mask[at], SHAPE).tolist() == labels.tolist()


@pytest.mark.parametrize("size", [None, 0.7])
def test_a_store_does_not_depend_on_the_tiles(cells, monkeypatch, tmp_path, size):
    pixels, mask = cells
    metadata = {"axes": "CYX", "Channel": {"Name": ["DNA", "P"]}, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(tmp_path / "s.ome.tif", pixels, tile=(64, 64), metadata=metadata, ome=True)
    tifffile.imwrite(tmp_path / "m.tif", mask, tile=(64, 64))
    pd.DataFrame({"image": ["s.ome.tif"], "mask": ["m.tif"], "group": ["g"]}).to_csv(tmp_path / "m.csv", index=False)
    stores = []
    for side in (1000, 96):
        tiled(monkeypatch, side)
        prepare(tmp_path / "m.csv", tmp_path / f"{side}.zarr", crop_px=24, pixel_size_um=size, qc=side == 96)
        table = anndata.read_zarr(tmp_path / f"{side}.zarr")
        stores.append(table[table.obs.sort_values("label").index])
    whole, parts = stores
    assert len(whole) > 20
    assert parts.obs.equals(whole.obs)
    np.testing.assert_allclose(parts.X, whole.X, rtol=1e-6)
    for name in whole.obsm:
        np.testing.assert_array_equal(parts.obsm[name], whole.obsm[name])
    assert (tmp_path / "96.qc" / "s.png").exists()


def test_memory_is_that_of_a_tile(tmp_path, monkeypatch):
    """A slide of 3 x 36 megapixels with its mask would take 288 MB."""
    side, names = 6000, ["DNA", "P", "Q"]
    mask = np.zeros((side, side), np.int32)
    for k, (y, x) in enumerate(rng.integers(40, side - 40, (300, 2)), 1):
        mask[y - 5 : y + 5, x - 5 : x + 5] = k
    metadata = {"axes": "CYX", "Channel": {"Name": names}}
    planes = (np.where(mask > 0, 200 + c, 10).astype(np.uint16) for c in range(3))
    tifffile.imwrite(tmp_path / "s.ome.tif", np.stack(list(planes)), tile=(512, 512), compression="zlib",
                     metadata=metadata, ome=True)  # fmt: skip
    tifffile.imwrite(tmp_path / "m.tif", mask, tile=(512, 512), compression="zlib")
    del mask
    pd.DataFrame({"image": ["s.ome.tif"], "mask": ["m.tif"], "group": ["g"]}).to_csv(tmp_path / "m.csv", index=False)
    tiled(monkeypatch, 512)
    tracemalloc.start()
    summary = prepare(tmp_path / "m.csv", tmp_path / "cells.zarr", crop_px=16, qc=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary.cells > 250
    assert peak < 60e6


def test_a_binary_mask_is_numbered_where_it_can_be_held(monkeypatch):
    mask = np.zeros((40, 40), np.int16)
    mask[3:5, 3:5] = mask[30:, 30:] = 1
    parts, count = connected(lambda *at: mask[at], mask.shape, "m.tif")
    assert count == 2
    assert parts[3, 3] != parts[35, 35]
    monkeypatch.setattr(scan, "BINARY_PX", 100)
    with pytest.raises(InputError, match=r"m\.tif holds one label alone"):
        connected(lambda *at: mask[at], mask.shape, "m.tif")
