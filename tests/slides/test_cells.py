"""The cells of a slide as a table."""

from contextlib import contextmanager
from dataclasses import replace

import anndata
import numpy as np
import pytest
import tifffile
from skimage.measure import regionprops_table

from imgshared.config import SlideConfig
from imgshared.data.ngff import open_ngff
from imgshared.data.prepare import prepare
from imgshared.data.store import CellStore
from imgshared.prediction import predict, predict_cells
from imgshared.prediction.trust import load_trust
from imgshared.slides import cells, predict_slide
from imgshared.slides.source import open_slide
from imgshared.types import InputError


@pytest.fixture
def labels(tmp_path):
    mask = np.zeros((700, 530), np.uint32)
    for label, (y, x) in enumerate(((10, 20), (240, 250), (600, 400)), 7):
        mask[y : y + 30, x : x + 24] = label
    mask[690:, 500:] = 4_000_000
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    return mask


def test_cells_are_measured_across_tiles(calibrated, pixels, labels, write_tiff, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "SIDE", 256)  # cell 8 lies on four of them
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    config = SlideConfig(tile=256, cells=str(tmp_path / "mask.tif"))
    out = predict_slide(calibrated, path, tmp_path / "o.ome.zarr", config)
    table = anndata.read_zarr(tmp_path / "o.cells.zarr")
    assert list(table.var_names) == ["DNA", "P1", "P1_imputed", "P2_imputed"]
    assert list(table.var["imputed"]) == [False, False, True, True]
    whole = np.concatenate([pixels, open_ngff(out).read([0, 1])])
    want = regionprops_table(
        labels.astype(np.int64), np.moveaxis(whole, 0, -1), properties=("label", "area", "centroid", "mean_intensity")
    )
    np.testing.assert_array_equal(table.obs["label"], want["label"])
    np.testing.assert_array_equal(table.obs["area_px"], want["area"])
    for c in range(4):
        np.testing.assert_allclose(table.X[:, c], want[f"mean_intensity-{c}"], rtol=1e-5)
    np.testing.assert_allclose(table.obsm["spatial"], np.stack([want["centroid-1"], want["centroid-0"]], 1) * 0.5)
    spread = table.layers["uncertainty"]
    assert np.isnan(spread[:, :2]).all()
    np.testing.assert_allclose(spread[:, 2], load_trust(calibrated.path).cells(table.X[:, 2], 1))


def test_masks_that_do_not_fit_are_refused_before_the_work(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    tifffile.imwrite(tmp_path / "small.tif", np.ones((350, 265), np.uint8))
    with pytest.raises(InputError, match=r"small.tif is 350 x 265 pixels, but what is predicted, level 0 of .* is 700"):
        predict_slide(run, path, tmp_path / "o.ome.zarr", SlideConfig(cells=str(tmp_path / "small.tif")))
    assert not (tmp_path / "o.ome.zarr.partial").exists()
    tifffile.imwrite(tmp_path / "empty.tif", np.zeros((700, 530), np.uint8))
    with pytest.raises(InputError, match=r"empty.tif holds no cell"):
        predict_slide(run, path, tmp_path / "o.ome.zarr", SlideConfig(cells=str(tmp_path / "empty.tif")))
    assert not (tmp_path / "o.ome.zarr.partial").exists()


def test_a_mask_is_looked_at_until_a_cell_is_found(run, pixels, labels, write_tiff, tmp_path, monkeypatch):
    looked = []

    @contextmanager
    def read_labels(path):
        yield lambda *at: looked.append(at) or labels[at]

    monkeypatch.setattr(cells, "SIDE", 256)
    monkeypatch.setattr(cells, "read_labels", read_labels)
    slide = open_slide(run, write_tiff(tmp_path / "s.ome.tif", pixels), SlideConfig())
    cells.open_labels(slide, tmp_path / "mask.tif")
    assert len(looked) == 1


def test_cells_on_glass_are_not_a_number(calibrated, pixels, labels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    tissue = np.zeros((700, 530), np.uint8)
    tissue[:260] = 1  # cell 7, and half of cell 8
    tifffile.imwrite(tmp_path / "tissue.tif", tissue)
    wish = SlideConfig(cells=str(tmp_path / "mask.tif"), tissue=str(tmp_path / "tissue.tif"))
    predict_slide(calibrated, path, tmp_path / "o.ome.zarr", wish)
    table = anndata.read_zarr(tmp_path / "o.cells.zarr")
    assert np.isfinite(table.X[:, :2]).all()
    np.testing.assert_array_equal(np.isnan(table.X[:, 2:]).all(1), [False, True, True, True])
    np.testing.assert_array_equal(np.isnan(table.layers["uncertainty"][:, 2:]).all(1), [False, True, True, True])
    assert table.layers["abstain"][1:, 2:].all()
    np.testing.assert_array_equal(np.isnan(table.obs["ood"]), [False, True, True, True])


def test_cells_are_judged_as_those_of_a_store(calibrated, toy, arrays, write_tiff, tmp_path):
    trust = load_trust(calibrated.path)
    wide = trust.pixels(predict_cells(calibrated, toy), 2).mean((1, 2))
    limit = np.array([np.inf, np.inf, np.median(wide)], np.float32)  # the weights are random: all would be too wide
    replace(trust, limit=limit).save(calibrated.path / "trust.npz")
    images, _, masks, _ = arrays
    side, rows = 24, 10  # crops of 16 px, apart from each other
    slide, mask = np.full((2, side * rows, side * 8), 100, np.uint16), np.zeros((side * rows, side * 8), np.uint16)
    for k, (image, one) in enumerate(zip(images, masks, strict=True)):
        y, x = side * (k // 8) + 4, side * (k % 8) + 4
        slide[:, y : y + 16, x : x + 16] = image[:2] * (1 + 9 * (k % 9 == 0))  # some as no cell of the training
        mask[y : y + 16, x : x + 16] = one * (k + 1)
    mask[:3, :3] = 99  # its crop leaves the slide
    path = write_tiff(tmp_path / "s.ome.tif", slide)
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    predict_slide(calibrated, path, tmp_path / "o.ome.zarr", SlideConfig(cells=str(tmp_path / "mask.tif")))
    table = anndata.read_zarr(tmp_path / "o.cells.zarr")
    (tmp_path / "manifest.csv").write_text("image,mask\ns.ome.tif,mask.tif\n")
    prepare(tmp_path / "manifest.csv", tmp_path / "cells.zarr", crop_px=16)
    predict(calibrated, CellStore(tmp_path / "cells.zarr"), tmp_path / "p.zarr")
    want = anndata.read_zarr(tmp_path / "p.zarr")
    rows = [list(table.obs["label"]).index(label) for label in want.obs["label"]]
    assert len(rows) == 80
    np.testing.assert_array_equal(table.obs["ood"].to_numpy()[rows], want.obs["ood"])
    np.testing.assert_array_equal(table.layers["abstain"][rows, 2:], want.layers["abstain"])
    assert 0 < want.layers["abstain"][:, 0].mean() < want.layers["abstain"][:, 1].mean() < 1  # odd, and odd or wide
    assert not table.layers["abstain"][:, :2].any()
    lone = list(table.obs["label"]).index(99)
    assert np.isnan(table.obs["ood"].iloc[lone])
    assert table.layers["abstain"][lone, 2:].all()
    assert sorted(p.name for p in (tmp_path / "o.ome.zarr").iterdir()) == ["0", "zarr.json"]


def test_a_slide_of_strange_cells_is_warned_of(calibrated, pixels, labels, write_tiff, tmp_path):
    """Cells of one brightness, fifty times the training's."""
    path = write_tiff(tmp_path / "s.ome.tif", np.full_like(pixels, 60000))
    config, told = SlideConfig(cells=str(tmp_path / "mask.tif")), list[str]()
    predict_slide(calibrated, path, tmp_path / "o.ome.zarr", config, warn=told.append)
    assert len(told) == 1
    assert "3 of 3 cells are unlike nearly all that the run was calibrated on, by their DNA" in told[0]


def test_without_a_calibration_nothing_is_judged(calibrated, pixels, labels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    wish = SlideConfig(cells=str(tmp_path / "mask.tif"), sharp=True)
    predict_slide(calibrated, path, tmp_path / "o.ome.zarr", wish)
    table = anndata.read_zarr(tmp_path / "o.cells.zarr")
    assert not table.layers
    assert "ood" not in table.obs
