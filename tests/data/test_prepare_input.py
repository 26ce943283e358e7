"""What users bring to `prepare`: names, files and pixels that do not agree, or of which no store can be made."""

import numpy as np
import pytest
import tifffile

from imgshared.data.ngff import open_ngff
from imgshared.data.prepare import prepare
from imgshared.data.segment import SegmentSettings
from imgshared.data.store import CellStore
from imgshared.types import InputError

PREDICTED = ("CD3_imputed", "cd8_IMPUTED", "CD3_imputed_uncertainty")
MASK = np.zeros((64, 64), np.uint16)
MASK[20:30, 20:30], MASK[36:46, 34:44] = 1, 2


def pixels(channels=2):
    return np.random.default_rng(0).integers(1, 4000, (channels, 64, 64)).astype(np.uint16)


def write_tiff(path, names, size=0.5, data=None):
    known = {} if size is None else {"PhysicalSizeX": size, "PhysicalSizeY": size}
    data = pixels(len(names)) if data is None else data
    metadata = {"axes": "CYX", "Channel": {"Name": list(names)}, **known}
    tifffile.imwrite(path, data, metadata=metadata, photometric="minisblack")


def prepared(folder, text, mask=MASK, **options):
    tifffile.imwrite(folder / "k.tif", mask)
    (folder / "m.csv").write_text(text)
    return prepare(folder / "m.csv", folder / "out.zarr", crop_px=32, **options)


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


def test_no_chromatin_name(tmp_path):
    write_tiff(tmp_path / "a.ome.tif", ("CD3", "LaminB1"))
    with pytest.raises(InputError, match="no marker has a usual chromatin name among CD3, LaminB1"):
        prepared(tmp_path, "image\na.ome.tif\n")


def test_image_missing_a_promised_marker(tmp_path):
    write_tiff(tmp_path / "a.ome.tif", ("DNA", "LaminB1"))
    with pytest.raises(InputError, match=r"promises the marker 'LaminB2' of .*a\.ome\.tif.*Did you mean 'LaminB1'"):
        prepared(tmp_path, "image,channels\na.ome.tif,DNA;LaminB2\n")


@pytest.mark.parametrize(("size", "told"), [(None, "unknown"), (0.25, "0.25 µm")])
def test_pixel_sizes_of_two_images_differ(tmp_path, size, told):
    write_tiff(tmp_path / "a.ome.tif", ("DNA", "LaminB1"), size)
    write_tiff(tmp_path / "b.ome.tif", ("DNA", "LaminB1"), 0.5)
    rows = "image,mask\na.ome.tif,k.tif\nb.ome.tif,k.tif\n"
    with pytest.raises(InputError, match=rf"pixel sizes differ: .*a\.ome\.tif {told}, .*b\.ome\.tif 0\.5 µm"):
        prepared(tmp_path, rows)
    agreed = {"source_pixel_size_um": 0.5} if size is None else {"pixel_size_um": 0.5}
    # at half its size image a is a crop of 32, which no nucleus is in the middle of
    assert prepared(tmp_path, rows, **agreed).cells == (4 if size is None else 2)


def test_dtypes_of_two_images_differ(tmp_path):
    write_tiff(tmp_path / "a.ome.tif", ("DNA", "LaminB1"))
    write_tiff(tmp_path / "b.ome.tif", ("DNA", "LaminB1"), data=(pixels() // 16).astype(np.uint8))
    with pytest.raises(InputError, match=r"b\.ome\.tif is uint8, but .*a\.ome\.tif is uint16"):
        prepared(tmp_path, "image\na.ome.tif\nb.ome.tif\n")


def test_lengths_in_micrometres_need_a_pixel_size(tmp_path):
    write_tiff(tmp_path / "a.ome.tif", ("DNA", "LaminB1"), None)
    with pytest.raises(InputError, match="'8 um': the images do not give their pixel size"):
        prepared(tmp_path, "image\na.ome.tif\n", segment=SegmentSettings(split="8 um"))


def test_no_nuclei(tmp_path):
    write_tiff(tmp_path / "a.ome.tif", ("DNA", "LaminB1"), data=np.full((2, 64, 64), 7, np.uint16))
    with pytest.raises(InputError, match=r"no nuclei found in any image of .*m\.csv \(a.*threshold_scale"):
        prepared(tmp_path, "image\na.ome.tif\n")
    assert not list(tmp_path.glob("out.zarr*"))
    write_tiff(tmp_path / "b.ome.tif", ("DNA", "LaminB1"))
    summary = prepared(tmp_path, "image,mask\na.ome.tif,\nb.ome.tif,k.tif\n")
    assert "1 image(s) without nuclei: a" in summary.warnings


def test_mask_of_another_shape(tmp_path):
    write_tiff(tmp_path / "a.ome.tif", ("DNA", "LaminB1"))
    with pytest.raises(InputError, match=r"k\.tif is 56 x 64 pixels, but its image .*a\.ome\.tif is 64 x 64"):
        prepared(tmp_path, "image,mask\na.ome.tif,k.tif\n", MASK[:-8])


def test_a_channel_that_is_damaged_is_named_by_its_own_file(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    for name, plane in zip(("DNA", "P"), pixels(), strict=True):
        tifffile.imwrite(folder / f"{name}.tif", plane, compression="zlib")
    broken = bytearray((folder / "P.tif").read_bytes())
    with tifffile.TiffFile(folder / "P.tif") as file:
        start = file.pages[0].dataoffsets[0]
    broken[start : start + 200] = b"\xff" * 200
    (folder / "P.tif").write_bytes(broken)
    with pytest.raises(InputError, match=r"P\.tif is damaged"):
        prepared(tmp_path, "image,mask\none,k.tif\n", pattern="{channel}.tif")


def test_predicted_channels_are_no_measurements(tmp_path):
    """As `predict measured=true` writes slides; one warning tells of all images."""
    for name in "ab":
        write_tiff(tmp_path / f"{name}.ome.tif", ("DNA", "LaminB1", *PREDICTED))
    rows = "image,mask\na.ome.tif,k.tif\nb.ome.tif,k.tif\n"
    summary = prepared(tmp_path, rows)
    assert CellStore(tmp_path / "out.zarr").panel.markers == ("DNA", "LaminB1")
    told = f"predicted channels of 2 image(s) are no measurements and were left out: {', '.join(PREDICTED)}"
    assert summary.warnings.count(told) == 1
    named = "image,mask,channels\na.ome.tif,k.tif,DNA;CD3_imputed\n"
    prepared(tmp_path, named, overwrite=True)
    assert CellStore(tmp_path / "out.zarr").panel.markers == ("DNA",)
    with pytest.raises(InputError, match="no marker 'CD3_imputed' in the panel DNA"):
        prepared(tmp_path, named, markers=["CD3_imputed"], overwrite=True)
    with pytest.raises(InputError, match="aliases: cd3_imputed is the name of a prediction"):
        prepared(tmp_path, named, aliases={"CD3": ["CD3_imputed"]}, overwrite=True)


def test_an_image_of_predictions_alone_is_refused(tmp_path):
    write_tiff(tmp_path / "a.ome.tif", PREDICTED)
    with pytest.raises(InputError, match=r"a\.ome\.tif holds predictions alone \(CD3_imputed, .*measured=true"):
        prepared(tmp_path, "image\na.ome.tif\n")
