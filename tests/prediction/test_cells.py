"""Cells that were never stained together: those that show the sources are predicted, the others left out and told."""

from dataclasses import replace

import anndata
import numpy as np
import pytest
import tifffile

from imgshared.config import CutConfig, PredictConfig
from imgshared.data.store import CellStore
from imgshared.prediction import predict, predict_batches, predict_cells, predictable
from imgshared.prediction.trust import Trust
from imgshared.prediction.write import Job, _predicted, _stored, _trust, _write
from imgshared.types import InputError

SHOWN = np.arange(16, 80)[1::2]  # the cells with DNA
CLOSE = {"rtol": 1e-4, "atol": 1e-2}  # camera counts: batches of another size round otherwise


@pytest.fixture(scope="module")
def cut(untrained, tmp_path_factory):
    """cut from DNA, never calibrated."""
    run = untrained(CutConfig(width=4, blocks=1, nce_layers=(0, 1), discriminator_channels=(4,)))
    return replace(run, path=tmp_path_factory.mktemp("cut"))


@pytest.fixture
def apart(arrays, write_store, tmp_path):
    """The toy cells, DNA in `SHOWN` alone, P1 and P2 in the others; no cell of the first image shows DNA."""
    images, measured, masks, obs = arrays
    measured[:] = [False, True, True]
    measured[SHOWN] = [True, False, False]
    return CellStore(write_store(tmp_path / "apart.zarr", images * measured[..., None, None], measured, masks, obs))


def test_cells_without_the_source_are_left_out_and_told(cut, apart, toy, tmp_path):
    told = []
    out = predict(cut, apart, tmp_path / "p.zarr", PredictConfig(batch_size=10), warn=told.append)
    assert told == ["48 of 80 cells are left out: they do not show DNA, from which the others are predicted"]
    found, whole = anndata.read_zarr(out), anndata.read_zarr(predict(cut, toy, tmp_path / "whole.zarr"))
    assert found.obs.equals(toy.obs.iloc[SHOWN])
    assert not found.layers["measured"].any()
    np.testing.assert_allclose(found.obsm["predicted_images"], whole.obsm["predicted_images"][SHOWN], **CLOSE)
    np.testing.assert_allclose(found.X, whole.X[SHOWN], **CLOSE)
    info = CellStore(out).info
    assert info["cells_left_out"] == 48
    assert info["cells_by_split_of_the_model"] == {"train": 16, "val": 8, "test": 8}


def test_nothing_is_told_where_all_cells_are_predicted(cut, toy, tmp_path):
    told = []
    out = predict(cut, toy, tmp_path / "p.zarr", warn=told.append)
    assert (told, CellStore(out).info["cells_left_out"]) == ([], 0)


def test_frames_are_of_the_predicted_cells(cut, apart, tmp_path):
    with pytest.warns(UserWarning, match="48 of 80 cells are left out"):
        out = predict(cut, apart, tmp_path / "p.zarr", PredictConfig(ome_tiff=True, batch_size=10))
    files = sorted((tmp_path / "p.zarr.ome").iterdir())
    assert [f.name for f in files] == [f"image{g}.ome.tif" for g in range(1, 5)]
    frames = tifffile.imread(files[0])
    np.testing.assert_allclose(frames[:, 0], apart.images(SHOWN[:8])[:, 0])
    np.testing.assert_array_equal(frames[:, 3:], CellStore(out).obsm("predicted_images", slice(8)))


def test_what_processes_wrote_is_of_the_right_cells(cut, apart, tmp_path):
    """As under torchrun: each writes its share, the first one reads them back."""
    job, parts = Job(cut, apart, [1, 2], PredictConfig(), None), []
    for k, share in enumerate((SHOWN[:20], SHOWN[20:])):
        parts.append(tmp_path / f"part{k}")
        _write(job, _predicted(job, share), parts[-1], share, False, None)
    blocks = list(_stored(parts, SHOWN, 7))
    np.testing.assert_array_equal(np.concatenate([b.cells for b in blocks]), SHOWN)
    images = np.concatenate([b.arrays["predicted_images"] for b in blocks])
    np.testing.assert_array_equal(images, np.concatenate([CellStore(p).obsm("predicted_images") for p in parts]))


def test_only_a_store_without_any_source_is_refused(cut, trained_run, arrays, write_store, tmp_path):
    images, measured, masks, obs = arrays
    measured[:, 0] = False
    without = CellStore(write_store(tmp_path / "without.zarr", images, measured, masks, obs))
    with pytest.raises(
        InputError, match=r"no cell can be predicted, all 80 do not show DNA: give other cells, for the"
    ):
        predict(cut, without, tmp_path / "p.zarr")
    with pytest.raises(InputError, match=r"all 80 do not show DNA: give other cells, or name other sources="):
        predict(trained_run, without, tmp_path / "p.zarr")
    assert not (tmp_path / "p.zarr").exists()
    able = predictable(trained_run, without, ["DNA", "P2"])  # a method that is bound to none takes any
    np.testing.assert_array_equal(able, measured[:, 2])


def test_in_memory_the_others_are_left_out_unless_they_are_asked_for(cut, apart):
    np.testing.assert_array_equal(predict_cells(cut, apart).cells, SHOWN)
    with pytest.raises(
        InputError, match=r"1 of the 2 cells .* they do not show DNA: leave them out, .*predictable says"
    ):
        predict_cells(cut, apart, np.array([0, SHOWN[0]]))


def test_intervals_of_stains_without_calibration_are_refused(trained_run, tmp_path, monkeypatch):
    half = np.full((3, 16), np.nan, np.float32)
    trust = Trust(0.9, 1, 5.0, *[half] * 4, *[np.zeros(0)] * 10)
    monkeypatch.setattr("imgshared.prediction.write.load_trust", lambda path: trust)
    with pytest.raises(
        InputError, match=r"no validation cell shows P1, P2 beside what it is predicted from; leave it out"
    ):
        _trust(trained_run, PredictConfig(intervals=True), [1, 2])
    assert _trust(trained_run, PredictConfig(), [1, 2]) is trust
    known = replace(trust, pixel_half=np.where(np.arange(3)[:, None] == 1, 0.1, half))
    monkeypatch.setattr("imgshared.prediction.write.load_trust", lambda path: known)
    assert _trust(trained_run, PredictConfig(intervals=True), [1]) is known
    with pytest.raises(
        InputError, match=r"no validation cell shows P2 beside .*; ask for markers=\[P1\], or leave it out"
    ):
        _trust(trained_run, PredictConfig(intervals=True), [1, 2])


def test_predictions_that_are_no_numbers_are_refused(trained_run, toy, monkeypatch):
    translate = trained_run.method.translate

    def broken(*args):
        found = translate(*args)
        mean = found.mean.clone()
        mean[-1, 0, 3, 4] = float("inf")
        return replace(found, mean=mean)

    monkeypatch.setattr(trained_run.method, "translate", broken)
    with pytest.raises(InputError, match=r"best.safetensors predicts values that are no numbers"):
        predict_cells(trained_run, toy, SHOWN)


def test_latents_of_the_sources_alone_are_those_beside_the_stains_own(trained_run, toy):
    every = predict_cells(trained_run, toy, SHOWN)
    (alone,) = predict_batches(trained_run, toy, SHOWN, own_latents=False)
    assert set(every.shared) == {"sources", *trained_run.panel.markers}
    assert (set(alone.shared), alone.specific) == ({"sources"}, {})
    np.testing.assert_array_equal(alone.shared["sources"], every.shared["sources"])
    np.testing.assert_array_equal(alone.source_error, every.source_error)
