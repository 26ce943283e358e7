"""What users bring to `prepare`: names, files and pixels of images that do not agree."""

import numpy as np
import pytest
import tifffile

from imgshared.data.ngff import open_ngff
from imgshared.data.prepare import prepare
from imgshared.data.store import CellStore
from imgshared.types import InputError

MASK = np.zeros((64, 64), np.uint16)
MASK[20:30, 20:30], MASK[36:46, 34:44] = 1, 2


def pixels(channels=2):
    return np.random.default_rng(0).integers(1, 4000, (channels, 64, 64)).astype(np.uint16)


def write_tiff(path, names):
    metadata = {"axes": "CYX", "Channel": {"Name": list(names)}, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(path, pixels(len(names)), metadata=metadata, photometric="minisblack")


def prepared(folder, text):
    tifffile.imwrite(folder / "k.tif", MASK)
    (folder / "m.csv").write_text(text)
    return prepare(folder / "m.csv", folder / "out.zarr", crop_px=32)


def test_the_summary_says_which_marker_is_chromatin(tmp_path):
    write_tiff(tmp_path / "a.ome.tif", ("H3", "DAPI"))
    summary = prepared(tmp_path, "image,mask\na.ome.tif,k.tif\n")
    assert summary.chromatin == CellStore(tmp_path / "out.zarr").panel.chromatin == "DAPI"
    assert "2 cells of 1 images, chromatin is DAPI" in str(summary)


def test_what_one_image_shows_beside_chromatin_is_no_other_name_of_it_in_the_next(tmp_path):
    write_tiff(tmp_path / "a.ome.tif", ("DAPI", "H3"))
    write_tiff(tmp_path / "b.ome.tif", ("CD3", "H3"))
    summary = prepared(tmp_path, "image,mask\na.ome.tif,k.tif\nb.ome.tif,k.tif\n")
    assert summary.measured == {"DAPI": 2, "H3": 4, "CD3": 2}


def test_byte_orders_may_differ_and_the_store_has_this_machines(tmp_path, write_image):
    write_tiff(tmp_path / "a.ome.tif", ("DNA", "LaminB1"))
    big = write_image(tmp_path / "b.ome.zarr", pixels().astype(">u2"), version="0.4")
    assert not open_ngff(big).dtype.isnative
    prepared(tmp_path, "image,mask\nb.ome.zarr,k.tif\na.ome.tif,k.tif\n")
    store = CellStore(tmp_path / "out.zarr")
    assert store.dtype == np.uint16
    assert store.dtype.isnative
    np.testing.assert_array_equal(store.images()[:2], store.images()[2:])
    np.testing.assert_array_equal(store.images()[0], pixels()[:, 9:41, 9:41])


def test_two_rows_that_share_the_file_of_a_channel_are_refused(tmp_path):
    for name, plane in zip("abc", pixels(3), strict=True):
        tifffile.imwrite(tmp_path / f"{name}.tif", plane)
    with pytest.raises(InputError, match=r"m\.csv: a\.tif and c\.tif are one image, for both read .*b\.tif: keep one"):
        prepared(tmp_path, "FileName_DNA,FileName_ER,mask\na.tif,b.tif,k.tif\nc.tif,./b.tif,k.tif\n")
