"""Where predictions are written, and what is never written over."""

import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
import zarr

from imgshared.config import SlideConfig
from imgshared.slides import predict_plate, predict_slide
from imgshared.slides.place import cells_path, partial_of
from imgshared.types import InputError


@pytest.mark.parametrize("slide", ["y.ome.tif.zarr", ".y.ome.tif.partial.zarr", "y.ome.tif.partial", "y.cells.zarr"])
def test_the_slide_is_never_an_intermediate_of_its_own_prediction(run, pixels, write_image, tmp_path, slide):
    path = write_image(tmp_path / slide, pixels[:, :300, :300], ("DNA", "P1"))
    if slide == "y.ome.tif.zarr":  # what intermediates were called once
        assert predict_slide(run, path, tmp_path / "y.ome.tif").is_file()
    else:
        with pytest.raises(InputError, match=r"is, holds or lies in the slide .* choose another name"):
            predict_slide(run, path, tmp_path / "y.ome.tif", overwrite=True)
    np.testing.assert_array_equal(zarr.open_group(path, mode="r")["0"][:], pixels[:, :300, :300])
    assert not [p for p in tmp_path.glob(".*") if p != path]


@pytest.mark.parametrize("name", ["o.ome.zarr", "o.ome.tif"])
def test_what_lies_beside_stays(run, pixels, write_tiff, tmp_path, name):
    path = write_tiff(tmp_path / "s.ome.tif", pixels[:, :300, :300])
    mine = tmp_path / (f"{name}.old" if name.endswith("zarr") else f"{name}.partial")
    mine.write_text("mine")
    for _ in range(2):
        predict_slide(run, path, tmp_path / name, overwrite=True)
    assert mine.read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"s.ome.tif", name, mine.name}


@pytest.mark.parametrize("name", ["o.ome.zarr", "o.ome.tif"])
def test_of_a_link_what_it_leads_to_is_replaced(run, pixels, write_tiff, tmp_path, name):
    path = write_tiff(tmp_path / "s.ome.tif", pixels[:, :300, :300])
    (tmp_path / "scratch").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "scratch" / name)
    for _ in range(2):
        predict_slide(run, path, tmp_path / name, overwrite=True)
    assert (tmp_path / name).is_symlink()
    assert [p.name for p in (tmp_path / "scratch").iterdir()] == [name]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_folder_where_one_stands_has_a_name(run, pixels, write_tiff, write_plate, tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "s.ome.tif", pixels[:, :300, :300])
    plate = write_plate(tmp_path / "plate.ome.zarr", lambda *_: pixels[:, :64, :64])
    here = predict_slide(run, path, tmp_path / "o.ome.zarr")
    monkeypatch.chdir(here)
    for predict, source in ((predict_slide, path), (predict_plate, plate)):
        with pytest.raises(InputError, match=r"o.ome.zarr exists already"):
            predict(run, source, Path("."))
    assert predict_slide(run, path, Path("."), overwrite=True) == here


def test_what_is_no_prediction_is_not_gone_on_with(run, pixels, write_tiff, write_image, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels[:, :300, :300])
    for out in (tmp_path / "o.ome.zarr", tmp_path / "o.ome.tif"):
        foreign = write_image(partial_of(out), pixels[:, :64, :64], ("DNA", "P1"))
        with pytest.raises(InputError, match=r"is no interrupted prediction: move it away"):
            predict_slide(run, path, out, overwrite=True)
        assert (foreign / "0" / "zarr.json").exists()
        zarr.open_group(foreign).attrs.put({})
        with pytest.raises(InputError, match=r"is no interrupted prediction: move it away"):
            predict_slide(run, path, out, overwrite=True)
        assert (foreign / "0" / "c").exists()
        shutil.rmtree(foreign)
        foreign.mkdir()
        (foreign / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match=r"is no interrupted prediction: move it away"):
            predict_slide(run, path, out, overwrite=True)
        shutil.rmtree(foreign)
        foreign.mkdir()
        (foreign / "zarr.1f.partial").write_text("{")  # killed before it began
        assert predict_slide(run, path, out).exists()


def test_names_of_other_kinds_are_refused(run, pixels, write_tiff, write_plate, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    for name in ("o.tif", "o.TIFF", "o.png", "o.ome.btf"):
        with pytest.raises(InputError, match=r"slides are written as OME-Zarr or OME-TIFF: end the name with"):
            predict_slide(run, path, tmp_path / name)
    plate = write_plate(tmp_path / "plate.ome.zarr", lambda *_: pixels[:, :64, :64])
    with pytest.raises(InputError, match=r"x.ome.tif: a plate is written as OME-Zarr"):
        predict_plate(run, plate, tmp_path / "x.ome.tif")
    with pytest.raises(InputError, match=r"x.tif: slides are written as"):
        predict_plate(run, plate, tmp_path / "x.tif")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plate.ome.zarr", "s.ome.tif"]


def test_something_else_is_not_replaced_even_on_request(run, pixels, write_tiff, write_image, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    (tmp_path / "o.ome.tif").mkdir()
    (tmp_path / "o.ome.zarr").write_text("a file")
    (tmp_path / "p.cells.zarr").mkdir()
    anndata.AnnData(np.ones((2, 2))).write_zarr(tmp_path / "q.cells.zarr")
    write_image(tmp_path / "raw.ome.zarr", pixels[:, :64, :64])
    write_tiff(tmp_path / "raw.ome.tif", pixels[:, :64, :64])
    names = {
        "image": ("o.ome.tif", "o.ome.zarr"),
        "prediction": ("raw.ome.tif", "raw.ome.zarr"),
        "table of cells": ("p.ome.zarr", "q.ome.zarr"),
    }
    before = sorted(tmp_path.rglob("*"))
    for kind, name in ((kind, name) for kind, some in names.items() for name in some):
        with pytest.raises(InputError, match=f"is no {kind}, so it is not replaced: choose another name"):
            predict_slide(run, path, tmp_path / name, SlideConfig(), overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_tables_of_cells_are_named_after_the_image(tmp_path):
    for name in ("s.ome.zarr", "s.zarr", "s.ome.tif", "s.OME.TIFF", "s"):
        assert cells_path(tmp_path / name).name == "s.cells.zarr"
