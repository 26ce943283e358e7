import dataclasses
import errno
import hashlib
import shutil
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import tifffile

from imgshared.config import PredictConfig
from imgshared.data.store import CellStore, StoreWriter
from imgshared.prediction import frames as frames_module
from imgshared.prediction import predict
from imgshared.prediction.trust import load_trust
from imgshared.prediction.write import Job, _predicted, _shares, _stored, _write, _write_shares
from imgshared.types import InputError

FRAMES = PredictConfig(ome_tiff=True)


def digest(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_written_store_is_an_anndata_with_what_is_documented(trained_run, toy, tmp_path):
    before = digest(toy.path)
    out = predict(trained_run, toy, tmp_path / "p.zarr", PredictConfig(full=True, shared=True))
    assert digest(toy.path) == before
    data = anndata.read_zarr(out)
    assert list(data.var_names) == ["P1", "P2"]
    assert data.obs.drop(columns="ood").equals(toy.obs)
    assert set(data.layers) == {"measured", "uncertainty", "abstain"}  # calibrated on its validation group
    shapes = {name: (data.obsm[name].shape, data.obsm[name].dtype) for name in data.obsm}
    assert shapes == {
        "predicted_images": ((80, 2, 16, 16), np.float32),
        "full_images": ((80, 2, 16, 16), np.float32),
        "shared_images": ((80, 2, 16, 16), np.float32),
        "X_shared": ((80, 8), np.float32),
        **{f"X_{marker}": ((80, 4), np.float32) for marker in ("DNA", "P1", "P2")},
        "spatial": ((80, 2), np.float64),
    }
    np.testing.assert_array_equal(data.layers["measured"], toy.measured[:, 1:])
    info = CellStore(out).info
    assert (info["kind"], info["store_hash"], info["sources"]) == ("predictions", toy.data_hash, ["DNA"])
    assert info["cells_by_split_of_the_model"] == {"train": 48, "val": 16, "test": 16}


def test_ome_tiff_for_a_viewer(trained_run, toy, tmp_path):
    out = predict(trained_run, toy, tmp_path / "p.zarr", PredictConfig(ome_tiff=True, batch_size=10))
    files = sorted((tmp_path / "p.zarr.ome").iterdir())
    assert [f.name for f in files] == [f"image{g}.ome.tif" for g in range(5)]
    with tifffile.TiffFile(files[1]) as tif:
        assert tif.series[0].axes == "TCYX"
        frames, ome = tif.asarray(), tif.ome_metadata
    for name in ("DNA", "P1", "P2", "P1_imputed", "P2_imputed"):
        assert f'Name="{name}"' in ome
    assert 'PhysicalSizeX="0.5"' in ome
    assert frames.shape == (16, 5, 16, 16)
    np.testing.assert_allclose(frames[:, :3], toy.images(slice(16, 32)), atol=1e-2)
    np.testing.assert_array_equal(frames[:, 3:], CellStore(out).obsm("predicted_images", slice(16, 32)))


def test_ome_tiff_refuses_images_that_would_share_a_file(trained_run, arrays, write_store, tmp_path):
    images, measured, masks, obs = arrays
    for names in (["a"] * 40 + ["b"] * 20 + ["a"] * 20, ["a/b"] * 40 + ["a_b"] * 40):
        obs["image"] = names
        store = CellStore(write_store(tmp_path / "o.zarr", images, measured, masks, obs))
        with pytest.raises(InputError, match=r"would fill a.*\.ome\.tif twice"):
            predict(trained_run, store, tmp_path / "p.zarr", PredictConfig(ome_tiff=True))
        assert [p.name for p in tmp_path.iterdir()] == ["o.zarr"]


def test_an_existing_output_is_replaced_only_on_request(trained_run, toy, tmp_path):
    out, config = tmp_path / "p.zarr", PredictConfig(ome_tiff=True)
    predict(trained_run, toy, out, config)
    before = digest(tmp_path)
    with pytest.raises(InputError, match=r"p\.zarr exists already"):
        predict(trained_run, toy, out, config)
    shutil.move(out, tmp_path / "q.zarr")
    with pytest.raises(InputError, match=r"p\.zarr\.ome exists already"):
        predict(trained_run, toy, out, config)
    shutil.move(tmp_path / "q.zarr", out)
    assert digest(tmp_path) == before
    predict(trained_run, toy, out, PredictConfig(ome_tiff=True, markers=("P1",)), overwrite=True)
    assert list(anndata.read_zarr(out).var_names) == ["P1"]
    assert tifffile.imread(tmp_path / "p.zarr.ome" / "image0.ome.tif").shape[1] == 4


@pytest.mark.parametrize("source", ["p.zarr", "p.zarr.partial", "p.zarr.ome", "p.zarr.ome.partial", "."])
def test_measured_images_are_never_overwritten(trained_run, make_store, tmp_path, source):
    store = CellStore(make_store(tmp_path / "cells" / source))
    before = digest(tmp_path)
    with pytest.raises(InputError, match="lies in the store that is predicted: measured images are never overwritten"):
        predict(trained_run, store, tmp_path / "cells" / "p.zarr", FRAMES, overwrite=True)
    assert digest(tmp_path) == before


def test_a_store_that_is_named_as_a_backup_is_predicted_into_the_other_name(trained_run, make_store, tmp_path):
    store = CellStore(make_store(tmp_path / "cells.zarr.old"))
    before = digest(store.path)
    for _ in range(2):
        predict(trained_run, store, tmp_path / "cells.zarr", overwrite=True)
    assert digest(store.path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.zarr", "cells.zarr.old"]


@pytest.mark.parametrize("place", ["p.zarr.ome", "p.zarr.ome.partial"])
def test_a_folder_that_holds_more_than_frames_is_not_replaced(trained_run, toy, tmp_path, place):
    (tmp_path / place).mkdir()
    (tmp_path / place / "image0.ome.tif").write_bytes(b"")
    (tmp_path / place / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=f"{place} holds more than pictures"):
        predict(trained_run, toy, tmp_path / "p.zarr", FRAMES, overwrite=True)
    (tmp_path / place / "notes.txt").unlink()
    predict(trained_run, toy, tmp_path / "p.zarr", FRAMES, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.zarr", "p.zarr.ome"]


@pytest.mark.parametrize("bytes_", [1000, 10**9])
def test_many_frames_are_a_big_tiff(trained_run, toy, tmp_path, monkeypatch, bytes_):
    monkeypatch.setattr(frames_module, "CLASSIC_BYTES", bytes_)
    predict(trained_run, toy, tmp_path / "p.zarr", FRAMES)
    with tifffile.TiffFile(tmp_path / "p.zarr.ome" / "image0.ome.tif") as tiff:
        assert tiff.is_bigtiff == (bytes_ == 1000)


def test_intervals_of_a_stain_without_calibration_are_refused(trained_run, toy, tmp_path):
    known = load_trust(trained_run.path)
    half = known.pixel_half.copy()
    half[2] = np.nan
    (tmp_path / "run").mkdir()
    dataclasses.replace(known, pixel_half=half).save(tmp_path / "run" / "trust.npz")
    run = dataclasses.replace(trained_run, path=tmp_path / "run")
    with pytest.raises(
        InputError, match=r"no validation cell shows P2 beside .*; ask for markers=\[P1\], or leave it out"
    ):
        predict(run, toy, tmp_path / "p.zarr", PredictConfig(intervals=True))
    with pytest.raises(InputError, match=r"no validation cell shows P2 beside .*; leave it out"):
        predict(run, toy, tmp_path / "p.zarr", PredictConfig(intervals=True, markers=("P2",)))
    assert predict(run, toy, tmp_path / "p.zarr", PredictConfig(intervals=True, markers=("P1",))).exists()
    assert predict(run, toy, tmp_path / "q.zarr").exists()


@pytest.mark.parametrize("when", ["third batch", "tables"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_prediction_that_fails_leaves_nothing(trained_run, toy, tmp_path, monkeypatch, when, error):
    append, calls = StoreWriter.append, []

    def fail(self, *args, **rows):
        calls.append(1)
        if when == "tables" or len(calls) == 3:
            raise error
        append(self, **rows)

    monkeypatch.setattr(StoreWriter, "append" if when == "third batch" else "finish", fail)
    with pytest.raises((InputError, KeyboardInterrupt)) as raised:
        predict(trained_run, toy, tmp_path / "p.zarr", PredictConfig(ome_tiff=True, batch_size=20))
    if isinstance(error, OSError):
        assert f"the disk is full: {tmp_path / 'p.zarr'} could not be written" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_at_the_last_picture_leaves_nothing(trained_run, toy, tmp_path, monkeypatch):
    write, calls = tifffile.imwrite, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # the last image
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(tifffile, "imwrite", fail)
    with pytest.raises(InputError, match="the disk is full"):
        predict(trained_run, toy, tmp_path / "p.zarr", PredictConfig(ome_tiff=True))
    assert not list(tmp_path.iterdir())


def test_progress_counts_cells(trained_run, toy, tmp_path):
    seen = []
    config = PredictConfig(batch_size=32)
    predict(trained_run, toy, tmp_path / "p.zarr", config, progress=lambda *at: seen.append(at))
    assert seen == [(32, 80), (64, 80), (80, 80)]


def test_two_processes_predict_what_one_does(trained_run, toy, in_two_processes, tmp_path):
    """Shares of 3 and 2 batches; every array, table and picture is the same."""
    wish = ("batch_size=18", "full=true", "intervals=true", "ome_tiff=true")
    said = in_two_processes("predict", trained_run.path, toy.path, "--out", tmp_path / "two.zarr", *wish)
    assert said.count("two.zarr") == 1
    one = predict(trained_run, toy, tmp_path / "one.zarr",
                  PredictConfig(batch_size=18, full=True, intervals=True, ome_tiff=True))  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.zarr", "one.zarr.ome", "two.zarr", "two.zarr.ome"]
    for frames in sorted((tmp_path / "one.zarr.ome").iterdir()):  # files differ by their UUID
        again = tifffile.imread(tmp_path / "two.zarr.ome" / frames.name)
        np.testing.assert_array_equal(again, tifffile.imread(frames))
    ours, theirs = (anndata.read_zarr(path) for path in (one, tmp_path / "two.zarr"))
    assert theirs.obs.equals(ours.obs)
    np.testing.assert_array_equal(theirs.X, ours.X)
    for kind in ("obsm", "layers"):
        first, second = getattr(ours, kind), getattr(theirs, kind)
        assert set(first) == set(second)
        for name in first:
            np.testing.assert_array_equal(second[name], first[name])
    assert CellStore(tmp_path / "two.zarr").data_hash == CellStore(one).data_hash


def test_more_processes_than_batches_leave_none_out():
    for count, batch, ranks in ((80, 18, 2), (5, 10, 3), (40, 10, 3)):
        cells = 2 * np.arange(count)  # some were left out
        shares = _shares(cells, batch, ranks)
        assert len(shares) == ranks
        assert np.concatenate(shares).tolist() == cells.tolist()
        assert all(len(s) % batch == 0 or s[-1] == cells[-1] for s in shares)


def test_an_empty_share_is_a_store_of_none(trained_run, toy, tmp_path):
    job = Job(trained_run, toy, [1, 2], PredictConfig(), None)
    out = _write(job, _predicted(job, np.arange(0)), tmp_path / "p.zarr", np.arange(0), False, None)
    assert list(_stored([out], np.arange(0), 10)) == []


def test_a_folder_that_is_no_share_is_not_removed(trained_run, toy, tmp_path):
    (tmp_path / "p.zarr.part0").mkdir()
    run = dataclasses.replace(trained_run, fabric=SimpleNamespace(world_size=2, global_rank=0))
    with pytest.raises(InputError, match=r"p\.zarr\.part0 is not a store, so it is not replaced"):
        _write_shares(Job(run, toy, [1, 2], PredictConfig(), None), tmp_path / "p.zarr", np.arange(4), False, None)
    assert [p.name for p in tmp_path.iterdir()] == ["p.zarr.part0"]
