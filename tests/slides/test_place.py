"""Where predictions are written, and what is never written over."""

import shutil

import numpy as np
import pytest
import zarr

from imgshared.config import SlideConfig
from imgshared.slides import predict_plate, predict_slide
from imgshared.slides.place import cells_path, partial_of, refuse_place
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


def test_a_step_aside_is_no_slide_either(tmp_path):
    with pytest.raises(InputError, match=r"o.ome.zarr.old is, holds or lies in the slide"):
        refuse_place(tmp_path / "o.ome.zarr.old", tmp_path / "o.ome.zarr", True)


def test_what_is_no_prediction_is_not_gone_on_with(run, pixels, write_tiff, write_image, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels[:, :300, :300])
    for out in (tmp_path / "o.ome.zarr", tmp_path / "o.ome.tif"):
        foreign = write_image(partial_of(out), pixels[:, :64, :64], ("DNA", "P1"))
        with pytest.raises(InputError, match=r"is no interrupted prediction: move it away"):
            predict_slide(run, path, out, overwrite=True)
        assert (foreign / "0" / "zarr.json").exists()
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


def test_something_else_is_not_replaced_even_on_request(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    (tmp_path / "o.ome.tif").mkdir()
    (tmp_path / "o.ome.zarr").write_text("a file")
    (tmp_path / "p.cells.zarr").mkdir()
    for name, kind in (("o.ome.tif", "image"), ("o.ome.zarr", "image"), ("p.ome.zarr", "table of cells")):
        with pytest.raises(InputError, match=f"is no {kind}, so it is not replaced: choose another name"):
            predict_slide(run, path, tmp_path / name, SlideConfig(), overwrite=True)


def test_tables_of_cells_are_named_after_the_image(tmp_path):
    for name in ("s.ome.zarr", "s.zarr", "s.ome.tif", "s.OME.TIFF", "s"):
        assert cells_path(tmp_path / name).name == "s.cells.zarr"
