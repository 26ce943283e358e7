"""OME-Zarr of both versions, by its metadata; plates become manifests; damage is named."""

import shutil

import numpy as np
import pandas as pd
import pytest
import tifffile

from imgshared import api
from imgshared.data.manifest import read_manifest
from imgshared.data.ngff import open_ngff, plate_fields
from imgshared.data.readers import open_image, open_mask, stem
from imgshared.data.store import CellStore
from imgshared.data.windows import read_labels
from imgshared.types import InputError

NAMES = ("DNA", "LaminB1")


def pixels(channels=2, side=48, dtype="uint16"):
    return np.random.default_rng(0).integers(0, 200, (channels, side, side + 16)).astype(dtype)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["cyx", "tczyx"])
def test_an_image_is_read_as_it_was_written(tmp_path, version, axes, write_image):
    data = pixels()
    image = open_image(write_image(tmp_path / "a.ome.zarr", data, version=version, axes=axes))
    assert image.channels == NAMES
    assert image.shape == data.shape
    assert image.dtype == data.dtype
    assert image.pixel_size_um == 0.5
    np.testing.assert_array_equal(image.read(), data)
    np.testing.assert_array_equal(image.read(["LaminB1"]), data[1:])
    assert stem("plates/a.ome.zarr") == "a"


def test_a_window_of_a_level_is_read_alone(tmp_path, write_image):
    data = pixels()
    image = open_ngff(write_image(tmp_path / "a.zarr", data))
    np.testing.assert_array_equal(image.read([1], slice(5, 20), slice(30, 60)), data[1:, 5:20, 30:60])
    np.testing.assert_array_equal(image.read([0], slice(0, 8), level=1), data[:1, ::2, ::2][:, :8])


def test_channels_and_sizes_that_it_does_not_tell(tmp_path, write_image):
    path = write_image(tmp_path / "a.zarr", pixels(), names=(), unit=None)
    with pytest.raises(InputError, match="does not name its 2 channel"):
        open_image(path)
    image = open_image(path, names=NAMES)
    assert image.channels == NAMES
    assert image.pixel_size_um is None


def test_labels_are_a_mask(tmp_path, write_image):
    mask = np.random.default_rng(0).integers(0, 9, (40, 50)).astype(np.uint32)
    path = write_image(tmp_path / "a.zarr", mask, names=(), axes="yx")
    assert open_mask(path).shape == (1, 40, 50)
    with read_labels(path) as read:
        np.testing.assert_array_equal(read(slice(3, 40), slice(0, 50)), mask[3:])


def drop_datasets(meta):
    del meta["ome"]["multiscales"][0]["datasets"]


def third_channel(meta):
    meta["ome"]["omero"]["channels"].append(meta["ome"]["omero"]["channels"][0])


def oblong(meta):
    meta["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"][1] = 0.1


def lost_level(meta):
    meta["ome"]["multiscales"][0]["datasets"][1]["path"] = "9"


def several(meta):
    meta["ome"] = {"version": "0.5", "bioformats2raw.layout": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_datasets, "no valid OME-Zarr image: multiscales.0.datasets: Field required"),
        (third_channel, "holds 2 channel.*names 3"),
        (oblong, "not square"),
        (lost_level, "promises a level '9' that is not there"),
        (several, "holds several images: name one of them"),
    ],
)
def test_damage_is_named(tmp_path, change, message, write_image):
    with pytest.raises(InputError, match=message):
        open_image(write_image(tmp_path / "a.zarr", pixels(), change=change))


def test_planes_are_not_guessed(tmp_path, write_image):
    with pytest.raises(InputError, match="3 focal planes"):
        open_image(write_image(tmp_path / "a.zarr", pixels(3), names=(), axes="zyx"), names=["a"])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_plate_is_a_manifest(tmp_path, version, write_plate):
    data = {}

    def field(well, name):
        data[well, name] = pixels() + len(data)
        return data[well, name]

    plate = write_plate(tmp_path / "plate.zarr", field, version)
    assert [(f.well, f.field) for f in plate_fields(plate)] == [("A01", "0"), ("A01", "1"), ("B02", "0"), ("B02", "1")]
    table = read_manifest(plate)
    assert [row.group for row in table.rows] == ["A01", "A01", "B02", "B02"]
    assert list(table.labels["row"]) == ["A", "A", "B", "B"]
    assert list(table.labels["column"]) == ["1", "1", "2", "2"]
    assert list(table.labels["field"]) == ["0", "1", "0", "1"]
    assert list(table.labels["well"]) == ["A01", "A01", "B02", "B02"]
    assert len({row.image for row in table.rows}) == 4
    np.testing.assert_array_equal(open_image(table.rows[2].path).read(), data["B/2", "0"])


def test_a_lost_field_or_well_is_named(tmp_path, write_plate):
    plate = write_plate(tmp_path / "plate.zarr", lambda well, field: pixels())
    shutil.rmtree(plate / "A" / "1" / "1")
    with pytest.raises(InputError, match=r"names 1 field\(s\) that are not there: well A01 field 1\. .*give a CSV"):
        read_manifest(plate)
    shutil.rmtree(plate / "B" / "2")
    with pytest.raises(InputError, match=r"names the well B/2, which is not there\. .*give a CSV"):
        read_manifest(plate)


def test_a_plate_is_prepared_without_its_damaged_fields_by_a_table(tmp_path, write_plate):
    plate = write_plate(tmp_path / "plate.zarr", lambda well, field: discs())
    for field in ("A/1/1", "B/2/0"):
        shutil.rmtree(plate / field / "0")
    with pytest.raises(InputError) as caught:
        api.prepare(plate, tmp_path / "cells.zarr", crop_px=16, qc=False)
    assert "2 field(s) cannot be opened: well A01 field 1, well B02 field 0 (" in str(caught.value)
    assert "promises a level '0' that is not there" in str(caught.value)
    assert "columns image (plate.zarr/A/1/0, ...) and well" in str(caught.value)
    (tmp_path / "rest.csv").write_text("image,well\nplate.zarr/A/1/0,A01\nplate.zarr/B/2/1,B02\n")
    store = CellStore(api.prepare(tmp_path / "rest.csv", tmp_path / "cells.zarr", crop_px=16, qc=False).path)
    assert store.obs["group"].value_counts().to_dict() == {"A01": 2, "B02": 2}


def test_what_all_fields_of_a_plate_lack_is_no_damage(tmp_path, write_plate):
    plate = write_plate(tmp_path / "plate.zarr", lambda well, field: pixels(dtype="int32"))
    with pytest.raises(InputError, match=r"A/1/0 has int32 pixels: convert to one of [a-z0-9, ]*$"):
        api.prepare(plate, tmp_path / "cells.zarr")


def discs(rng=None):
    """Two nuclei, and the same mirrored."""
    yy, xx = np.mgrid[:64, :64]
    disc = sum(np.exp(-(((yy - y) ** 2 + (xx - x) ** 2) / 30)) for y, x in ((20, 20), (44, 40)))
    noise = (rng or np.random.default_rng(0)).integers(0, 20, (2, 64, 64))
    return (np.stack([disc, disc[::-1]]) * 800 + noise).astype(np.uint16)


def test_a_plate_is_prepared_like_files(tmp_path, write_plate):
    """The same discs, as a plate and as OME-TIFFs, give the same cells."""
    rng = np.random.default_rng(0)
    plate = write_plate(tmp_path / "plate.zarr", lambda well, field: discs(rng))
    rows = []
    for row in read_manifest(plate).rows:
        name = row.image.replace("/", "_") + ".ome.tif"
        tifffile.imwrite(
            tmp_path / name, open_image(row.path).read(),
            metadata={"axes": "CYX", "Channel": {"Name": list(NAMES)}, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
        )  # fmt: skip
        rows.append({"image": name, "group": row.group})
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    stores = [
        CellStore(api.prepare(manifest, tmp_path / f"{k}.zarr", crop_px=16, qc=False).path)
        for k, manifest in enumerate((plate, tmp_path / "manifest.csv"))
    ]
    assert len(stores[0]) == len(stores[1]) == 8
    assert stores[0].data_hash == stores[1].data_hash
    assert list(stores[0].obs["group"]) == list(stores[1].obs["group"])
