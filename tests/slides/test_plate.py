"""Plates: field by field."""

import shutil

import numpy as np
import pytest
import zarr

from imgshared.config import SlideConfig
from imgshared.data.ngff import open_ngff, plate_fields
from imgshared.prediction import predict_image
from imgshared.slides import plate as module
from imgshared.slides import predict_plate
from imgshared.types import InputError


def field_pixels(well, field):
    rng = np.random.default_rng(sum(map(ord, well + field)))
    return rng.integers(0, 900, (2, 130, 141)).astype(np.uint16)


@pytest.fixture
def plate(write_plate, tmp_path):
    return write_plate(tmp_path / "plate.ome.zarr", field_pixels)


def test_every_field_is_predicted_in_its_place(run, plate, tmp_path):
    out = predict_plate(run, plate, tmp_path / "out.ome.zarr")
    assert [f.path for f in plate_fields(out)] == ["A/1/0", "A/1/1", "B/2/0", "B/2/1"]
    for field in plate_fields(out):
        image = open_ngff(out / field.path)
        assert image.channels == ("P1_imputed", "P2_imputed")
        whole = predict_image(run, field_pixels(field.path[:3], field.field), ["DNA", "x"])
        np.testing.assert_array_equal(image.read([0, 1]), np.rint(whole).clip(0, 65535))


@pytest.mark.parametrize("lost", ["B/2/1", "B/2/1/0", "B/2"])
def test_what_is_missing_is_named_and_left_out_on_request(run, plate, tmp_path, lost):
    shutil.rmtree(plate / lost)
    with pytest.raises(InputError, match=rf"{lost[:5]}.* Copy it again, or leave .*skip_damaged=true"):
        predict_plate(run, plate, tmp_path / "out.ome.zarr")
    out = predict_plate(run, plate, tmp_path / "out.ome.zarr", SlideConfig(skip_damaged=True))
    assert [f.path for f in plate_fields(out)] == ["A/1/0", "A/1/1", "B/2/0"][: 2 if lost == "B/2" else 3]
    assert zarr.open_group(out, mode="r").attrs["imgshared"]["missing"] == [lost[:5]]


def test_a_plate_without_any_field_is_refused(run, plate, tmp_path):
    shutil.rmtree(plate / "A" / "1")
    shutil.rmtree(plate / "B" / "2")
    with pytest.raises(InputError, match="names the well A/1, which is not there"):
        predict_plate(run, plate, tmp_path / "out.ome.zarr", SlideConfig(skip_damaged=True))


def test_a_plate_is_not_gone_on_with_other_settings(run, plate, tmp_path):
    def stop(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out.ome.zarr"
    with pytest.raises(KeyboardInterrupt):
        predict_plate(run, plate, out, SlideConfig(markers=("P1",)), progress=stop)
    other = SlideConfig(markers=("P2",))
    with pytest.raises(InputError, match=r"holds an interrupted prediction with another settings: pass --overwrite"):
        predict_plate(run, plate, out, other)
    predict_plate(run, plate, out, other, overwrite=True)
    assert {open_ngff(out / f.path).channels for f in plate_fields(out)} == {("P2_imputed",)}
    about = zarr.open_group(out, mode="r").attrs["imgshared"]
    assert (about["kind"], about["settings"]["markers"]) == ("predicted plate", ["P2"])


def test_an_interrupted_plate_goes_on(run, plate, tmp_path, monkeypatch):
    def stop(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_plate(run, plate, tmp_path / "out.ome.zarr", progress=stop)
    again, predict = [], module.predict_slide
    monkeypatch.setattr(module, "predict_slide", lambda *a, **k: (again.append(a[1]), predict(*a, **k)))
    out = predict_plate(run, plate, tmp_path / "out.ome.zarr")
    assert [str(p.relative_to(plate)) for p in again] == ["B/2/0", "B/2/1"]
    assert len(plate_fields(out)) == 4


def test_a_mask_of_cells_belongs_to_a_slide(run, plate, tmp_path):
    with pytest.raises(InputError, match=r"cells=\.\.\. is the mask of one slide"):
        predict_plate(run, plate, tmp_path / "out.ome.zarr", SlideConfig(cells="mask.tif"))
