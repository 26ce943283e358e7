"""Predictions that are interrupted and gone on with."""

import errno
import itertools
from contextlib import contextmanager

import anndata
import numpy as np
import pytest
import tifffile
import zarr

from imgshared.config import SlideConfig
from imgshared.data.ngff import open_ngff
from imgshared.slides import cells as cells_module
from imgshared.slides import predict as module
from imgshared.slides import predict_slide
from imgshared.slides import tiff as tiff_module
from imgshared.slides.place import partial_of
from imgshared.slides.predict import PyramidWriter
from imgshared.types import InputError

SMALL = SlideConfig(tile=256)


class Stopped(Exception):
    pass


def predicted(path):
    image = open_ngff(path)
    return image.read(range(image.shape[0]))


def stop(*_, **__):
    raise Stopped


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def no_tile_again(monkeypatch):
    """No tile may be predicted within."""
    with monkeypatch.context() as m:
        m.setattr(PyramidWriter, "write", lambda *_: pytest.fail("predicted again"))
        yield


def test_an_interrupted_prediction_goes_on(run, pixels, write_tiff, tmp_path, monkeypatch):
    path, out = write_tiff(tmp_path / "s.ome.tif", pixels), tmp_path / "out.ome.zarr"
    whole = predicted(predict_slide(run, path, tmp_path / "whole.ome.zarr", SMALL))

    def stop_at(what, done, total):
        assert total == 9
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        predict_slide(run, path, out, SMALL, progress=stop_at)
    assert not out.exists()
    written, write = [], PyramidWriter.write
    monkeypatch.setattr(PyramidWriter, "write", lambda self, n, *rest: (written.append(n), write(self, n, *rest)))
    with pytest.raises(InputError, match="interrupted prediction with another settings: pass --overwrite"):
        predict_slide(run, path, out, SlideConfig(tile=512))
    np.testing.assert_array_equal(predicted(predict_slide(run, path, out, SMALL)), whole)
    assert 0 not in written
    assert 4 <= len(written) <= 6


def test_an_ome_tiff_of_other_settings_is_not_taken_for_this_one(run, pixels, write_tiff, tmp_path, monkeypatch):
    path, out = write_tiff(tmp_path / "s.ome.tif", pixels), tmp_path / "out.ome.tif"
    with monkeypatch.context() as m:
        m.setattr(module, "write_ome_tiff", stop)
        with pytest.raises(Stopped):
            predict_slide(run, path, out, SlideConfig(markers=("P1",)))
    other = SlideConfig(markers=("P2",))
    with pytest.raises(InputError, match=r"interrupted prediction with another settings, imputed: pass --overwrite"):
        predict_slide(run, path, out, other)
    predict_slide(run, path, out, other, overwrite=True)
    with tifffile.TiffFile(out) as tiff:
        assert 'Name="P2_imputed"' in tiff.ome_metadata
        assert "P1_imputed" not in tiff.ome_metadata
    assert not partial_of(out).exists()


def test_an_ome_tiff_is_written_of_what_was_predicted(run, pixels, write_tiff, tmp_path, monkeypatch):
    path, out = write_tiff(tmp_path / "s.ome.tif", pixels), tmp_path / "out.ome.tif"
    with monkeypatch.context() as m:
        m.setattr(module, "write_ome_tiff", stop)
        with pytest.raises(Stopped):
            predict_slide(run, path, out, SMALL)
    with no_tile_again(monkeypatch):
        predict_slide(run, path, out, SMALL)
    whole = predict_slide(run, path, tmp_path / "whole.ome.zarr", SMALL)
    np.testing.assert_array_equal(tifffile.imread(out), predicted(whole))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ome.tif", "s.ome.tif", "whole.ome.zarr"]


@pytest.mark.parametrize("name", ["out.ome.zarr", "out.ome.tif"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_cells_are_measured_of_what_was_predicted(run, pixels, write_tiff, tmp_path, monkeypatch, name, overwrite):
    path, out = write_tiff(tmp_path / "s.ome.tif", pixels[:, :300, :300]), tmp_path / name
    mask = np.zeros((300, 300), np.uint8)
    mask[50:80, 50:80] = 1
    tifffile.imwrite(tmp_path / "m.tif", mask)
    wish = SlideConfig(cells=str(tmp_path / "m.tif"), normaliser="slide")
    if overwrite:
        predict_slide(run, path, out, SlideConfig(markers=("P1",)))
    before = out.stat().st_ino if overwrite else None
    for place in ("measure_cells", "write_ome_tiff" if name.endswith("tif") else "put_in_place"):
        with monkeypatch.context() as m:
            m.setattr(module, place, stop)
            with pytest.raises(Stopped):
                predict_slide(run, path, out, wish, overwrite=overwrite)
        assert (out.stat().st_ino if out.exists() else None) == before  # nothing has its name before it is whole
    with no_tile_again(monkeypatch):
        predict_slide(run, path, out, wish, overwrite=overwrite)
    assert list(anndata.read_zarr(tmp_path / "out.cells.zarr").var_names) == ["DNA", "P1", "P1_imputed", "P2_imputed"]
    assert not partial_of(out).exists()
    with pytest.raises(InputError, match="exists already"):
        predict_slide(run, path, out, wish)


def test_a_line_that_was_cut_off_is_no_finished_tile(tmp_path):
    writer = PyramidWriter(tmp_path / "a", (1, 512, 512), np.dtype("uint8"), tile=256, about={})
    writer.note(1)
    (writer.folder / "tiles-done.1").write_text("0\n2")
    assert writer.done() == {0, 1}


def test_what_a_killed_process_was_writing_is_swept_up(run, pixels, write_tiff, tmp_path, monkeypatch):
    path, out = write_tiff(tmp_path / "s.ome.tif", pixels[:, :300, :300]), tmp_path / "o.ome.zarr"
    with monkeypatch.context() as m:
        m.setattr(PyramidWriter, "finish", stop)
        with pytest.raises(Stopped):
            predict_slide(run, path, out, SMALL)
    (partial_of(out) / "0" / "c" / "0" / "0" / "0.5d.partial").write_bytes(b"half a shard")
    predict_slide(run, path, out, SMALL)
    assert list(out.rglob("*.partial")) == []
    assert sorted(p.name for p in out.iterdir()) == ["0", "zarr.json"]


@pytest.mark.parametrize("where", ["tile", "pyramid", "tiff", "cells"])
def test_a_full_disk_keeps_what_is_done(run, pixels, write_tiff, tmp_path, monkeypatch, where):
    path, out = write_tiff(tmp_path / "s.ome.tif", np.tile(pixels, (1, 2, 2))), tmp_path / "o.ome.tif"
    mask = np.zeros((1400, 1060), np.uint8)
    mask[50:80, 50:80] = 1
    tifffile.imwrite(tmp_path / "m.tif", mask)
    wish = SlideConfig(cells=str(tmp_path / "m.tif"), normaliser="slide")
    coarser, tiles = PyramidWriter._coarser, tiff_module._tiles

    def some_tiles(level):
        yield from itertools.islice(tiles(level), 3)
        full()

    half = {
        "tile": (PyramidWriter, "write", full),
        "pyramid": (PyramidWriter, "_coarser", lambda *at: (coarser(*at), full())),
        "tiff": (tiff_module, "_tiles", some_tiles),
        "cells": (cells_module, "write_anndata", full),
    }[where]
    with monkeypatch.context() as m:
        m.setattr(*half)
        with pytest.raises(InputError, match=r"the disk is full: what is done of .* is kept"):
            predict_slide(run, path, out, wish)
    there = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert there - {"o.cells.zarr"} == {"s.ome.tif", "m.tif"}
    assert ("o.cells.zarr" in there) == (where == "tiff")  # whole, and named before the image
    if where == "tile":
        predict_slide(run, path, out, wish)
    else:
        with no_tile_again(monkeypatch):
            predict_slide(run, path, out, wish)
    with tifffile.TiffFile(out) as tiff:
        assert [level.shape for level in tiff.series[0].levels] == [(2, 1400, 1060), (2, 700, 530)]
    beside = predict_slide(run, path, tmp_path / "whole.ome.zarr", SlideConfig(normaliser="slide"))
    for level in range(2):
        want = zarr.open_group(beside, mode="r")[str(level)][:]
        np.testing.assert_array_equal(tifffile.imread(out, level=level), want)
