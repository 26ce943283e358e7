"""The cells of a slide as a table."""

import anndata
import numpy as np
import pytest
import tifffile
from skimage.measure import regionprops_table

from imgshared.config import SlideConfig
from imgshared.data.ngff import open_ngff
from imgshared.prediction.trust import load_trust
from imgshared.slides import cells, predict_slide
from imgshared.types import InputError


@pytest.fixture
def labels(tmp_path):
    mask = np.zeros((700, 530), np.uint32)
    for label, (y, x) in enumerate(((10, 20), (240, 250), (600, 400)), 7):
        mask[y : y + 30, x : x + 24] = label
    mask[690:, 500:] = 4_000_000
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    return mask


def test_cells_are_measured_across_tiles(run, pixels, labels, write_tiff, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "SIDE", 256)  # cell 8 lies on four of them
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    config = SlideConfig(tile=256, cells=str(tmp_path / "mask.tif"))
    out = predict_slide(run, path, tmp_path / "o.ome.zarr", config)
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
    np.testing.assert_allclose(spread[:, 2], load_trust(run.path).cells(table.X[:, 2], 1))


def test_masks_that_do_not_fit_are_refused_before_the_work(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    tifffile.imwrite(tmp_path / "small.tif", np.ones((350, 265), np.uint8))
    with pytest.raises(InputError, match=r"small.tif is 350 x 265 pixels, but what is predicted, level 0 of .* is 700"):
        predict_slide(run, path, tmp_path / "o.ome.zarr", SlideConfig(cells=str(tmp_path / "small.tif")))
    assert not (tmp_path / "o.ome.zarr.partial").exists()
    tifffile.imwrite(tmp_path / "empty.tif", np.zeros((700, 530), np.uint8))
    with pytest.raises(InputError, match=r"empty.tif holds no cell"):
        predict_slide(run, path, tmp_path / "o.ome.zarr", SlideConfig(cells=str(tmp_path / "empty.tif")))
