import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from imgshared.data.readers import open_image, open_mask, stem
from imgshared.data.windows import read_labels
from imgshared.types import InputError

NAMES = ("DNA", "LaminB1")


def pixels(dtype="uint16", channels=2, side=48):
    return np.random.default_rng(0).integers(0, 200, (channels, side, side + 16)).astype(dtype)


def write_ome(path, data, names=NAMES, **metadata):
    tifffile.imwrite(path, data, metadata={"axes": "CYX", "Channel": {"Name": list(names)}, **metadata})
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "lzw"}, {"compression": "deflate"}, {"tile": (16, 16), "compression": "lzw"}]
)
@pytest.mark.parametrize("ome", [True, False])
def test_tiff_round_trip(tmp_path, dtype, options, ome):
    data = pixels(dtype)
    path = tmp_path / ("a.ome.tif" if ome else "a.tif")
    metadata = {"axes": "CYX", "Channel": {"Name": list(NAMES)}} if ome else None
    tifffile.imwrite(path, data, photometric="minisblack", metadata=metadata, **options)
    image = open_image(path, names=() if ome else NAMES)
    assert image.channels == NAMES
    assert image.shape == data.shape
    assert image.dtype == dtype
    np.testing.assert_array_equal(image.read(), data)
    np.testing.assert_array_equal(image.read(["LaminB1"]), data[1:])


def test_pages_written_one_by_one_are_channels(tmp_path):
    data = pixels(channels=3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for plane in data:
            writer.write(plane)
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif", names="abc").read("cb"), data[[2, 1]])


def test_three_planes_that_tifffile_calls_rgb_are_channels(tmp_path):
    data = pixels("uint8", 3)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif", names="abc").read(), data)


def test_interleaved_samples_are_channels(tmp_path):
    data = pixels("uint16", 2)
    tifffile.imwrite(tmp_path / "a.tif", data.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif", names="ab").read("b"), data[1:])


def test_big_endian_pixels_become_native(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", pixels(), photometric="minisblack", byteorder=">")
    read = open_image(tmp_path / "a.tif", names=NAMES).read()
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, pixels())


def test_pyramid_reads_the_full_resolution(tmp_path):
    data = pixels()
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        writer.write(data, subifds=1, metadata={"axes": "CYX", "Channel": {"Name": list(NAMES)}})
        writer.write(data[:, ::2, ::2], subfiletype=1)
    np.testing.assert_array_equal(open_image(tmp_path / "a.ome.tif").read(), data)


@pytest.mark.parametrize(("size", "unit", "um"), [(0.5, "µm", 0.5), (325, "nm", 0.325)])
def test_pixel_size_from_ome(tmp_path, size, unit, um):
    sizes = {f"PhysicalSize{a}": size for a in "XY"} | {f"PhysicalSize{a}Unit": unit for a in "XY"}
    assert open_image(write_ome(tmp_path / "a.ome.tif", pixels(), **sizes)).pixel_size_um == pytest.approx(um)


def test_pixels_that_are_not_square(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", pixels(), PhysicalSizeX=0.5, PhysicalSizeY=1.0)
    with pytest.raises(InputError, match=r"a\.ome\.tif.*not square"):
        open_image(path)


def test_imagej_labels_and_pixel_size(tmp_path):
    metadata = {"axes": "CYX", "Labels": list(NAMES), "unit": "um"}
    tifffile.imwrite(tmp_path / "a.tif", pixels(), imagej=True, resolution=(2, 2), metadata=metadata)
    image = open_image(tmp_path / "a.tif")
    assert image.channels == NAMES
    assert image.pixel_size_um == 0.5


def test_placeholder_names_do_not_count(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", pixels(), ("Channel:0:0", "Channel:0:1"))
    assert open_image(path, names=NAMES).channels == NAMES
    with pytest.raises(InputError, match=r"a\.ome\.tif does not name its 2 channel"):
        open_image(path)


def test_singleton_planes_are_squeezed_and_stacks_refused(tmp_path):
    data = pixels()[:, None]
    tifffile.imwrite(tmp_path / "a.ome.tif", data, metadata={"axes": "CZYX", "Channel": {"Name": list(NAMES)}})
    np.testing.assert_array_equal(open_image(tmp_path / "a.ome.tif").read(), data[:, 0])
    for axis, word in (("Z", "focal planes"), ("T", "time points")):
        tifffile.imwrite(tmp_path / "b.ome.tif", data[:, 0], metadata={"axes": f"{axis}YX"})
        with pytest.raises(InputError, match=rf"b\.ome\.tif holds 2 {word}"):
            open_image(tmp_path / "b.ome.tif", names=NAMES)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_folder_of_single_channels(tmp_path, suffix):
    data = pixels()
    for name, plane in zip(NAMES, data, strict=True):
        path = tmp_path / f"well_A01_{name}.{suffix}"
        Image.fromarray(plane).save(path) if suffix == "png" else tifffile.imwrite(path, plane)
    (tmp_path / "notes.txt").touch()
    image = open_image(tmp_path, pattern=f"*_{{channel}}.{suffix}")
    assert image.channels == NAMES
    np.testing.assert_array_equal(image.read(["LaminB1", "DNA"]), data[::-1])


def test_folder_errors_name_the_file(tmp_path):
    with pytest.raises(InputError, match="pattern="):
        open_image(tmp_path)
    with pytest.raises(InputError, match=r"no file is named like .*; it holds nothing"):
        open_image(tmp_path, pattern="{channel}.tif")
    tifffile.imwrite(tmp_path / "DNA.tif", pixels()[0])
    tifffile.imwrite(tmp_path / "dna.tiff", pixels()[0])
    with pytest.raises(InputError, match="duplicate channel names: DNA, dna"):
        open_image(tmp_path, pattern="{channel}.tif*")
    (tmp_path / "dna.tiff").unlink()
    tifffile.imwrite(tmp_path / "LaminB1.tif", pixels()[0, :-1])
    with pytest.raises(InputError, match=r"LaminB1\.tif is 47 x 64 pixels, but DNA\.tif is 48 x 64"):
        open_image(tmp_path, pattern="{channel}.tif")
    tifffile.imwrite(tmp_path / "LaminB1.tif", pixels("uint8")[0])
    with pytest.raises(InputError, match=r"LaminB1\.tif is uint8, DNA\.tif is uint16"):
        open_image(tmp_path, pattern="{channel}.tif")


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16), "compression": "lzw"}])
def test_truncated_tiff(tmp_path, fraction, options):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, pixels(), metadata={"axes": "CYX", "Channel": {"Name": list(NAMES)}}, **options)
    os.truncate(path, int(path.stat().st_size * fraction))
    with pytest.raises(InputError, match=r"a\.ome\.tif"):
        open_image(path, names=NAMES).read()


def test_truncated_png(tmp_path):
    Image.fromarray(pixels()[0]).save(tmp_path / "DNA.png")
    os.truncate(tmp_path / "DNA.png", 500)
    with pytest.raises(InputError, match=r"DNA\.png is truncated"):
        open_image(tmp_path / "DNA.png", names=["DNA"]).read()


def test_a_png_too_large_for_pillow(tmp_path, monkeypatch):
    Image.fromarray(pixels()[0]).save(tmp_path / "DNA.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"DNA\.png is a PNG of more than 178 megapixels: save it as a tiled TIFF"):
        open_image(tmp_path / "DNA.png", names=["DNA"])


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.txt", "none.tif"])
def test_not_an_image(tmp_path, name):
    if name[0] == "a":
        (tmp_path / name).write_text("these are no pixels" * 20)
    with pytest.raises(InputError, match=name):
        open_image(tmp_path / name, names=NAMES)


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint32", "float64", "bool"])
def test_dtype_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", pixels(dtype), photometric="minisblack")
    with pytest.raises(InputError, match=rf"a\.tif has {dtype} pixels: convert"):
        open_image(tmp_path / "a.tif", names=NAMES)


def test_rgb_refused(tmp_path):
    rgb = np.zeros((32, 32, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb")
    Image.fromarray(rgb).save(tmp_path / "a.png")
    for name in ("a.tif", "a.png"):
        with pytest.raises(InputError, match=rf"{name} is .*(RGB|colour)"):
            open_image(tmp_path / name, names="abc")


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "NaN or infinite"), (-1, "negative")])
def test_float_pixels_that_are_no_intensities(tmp_path, value, word):
    data = pixels("float32")
    data[1, 3, 3] = value
    image = open_image(write_ome(tmp_path / "a.ome.tif", data))
    image.read(["DNA"])
    with pytest.raises(InputError, match=rf"a\.ome\.tif: channel 'LaminB1' holds .*{word}"):
        image.read()


def test_channel_names_duplicate_or_of_another_number(tmp_path):
    with pytest.raises(InputError, match=r"a\.ome\.tif has duplicate channel names: DNA, dna"):
        open_image(write_ome(tmp_path / "a.ome.tif", pixels(), ("DNA", "dna")))
    tifffile.imwrite(tmp_path / "b.tif", pixels(), photometric="minisblack")
    with pytest.raises(InputError, match=r"b\.tif holds 2 channel\(s\), but 3 are named: a, b, c"):
        open_image(tmp_path / "b.tif", names="abc")


def test_masks(tmp_path):
    mask = np.arange(12, dtype=np.int32).reshape(3, 4)
    tifffile.imwrite(tmp_path / "m.tif", mask)
    assert open_mask(tmp_path / "m.tif").shape == (1, 3, 4)
    whole = slice(0, 3), slice(0, 4)
    with read_labels(tmp_path / "m.tif") as read:
        np.testing.assert_array_equal(read(*whole), mask)
    tifffile.imwrite(tmp_path / "m.tif", mask > 3)
    with read_labels(tmp_path / "m.tif") as read:
        np.testing.assert_array_equal(read(*whole), (mask > 3).astype(int))
    tifffile.imwrite(tmp_path / "m.tif", mask - 1)
    with read_labels(tmp_path / "m.tif") as read, pytest.raises(InputError, match=r"m\.tif holds negative labels"):
        read(*whole)
    tifffile.imwrite(tmp_path / "m.tif", mask.astype("float32"))
    with pytest.raises(InputError, match=r"m\.tif is no label mask"):
        open_mask(tmp_path / "m.tif")


@pytest.mark.parametrize("name", ["x/a.b.ome.tif", "a.b.tiff", r"c:\y\a.b.png", "a.b"])
def test_stem(name):
    assert stem(name) == "a.b"


@pytest.mark.skipif("IMGSHARED_REAL_DATA" not in os.environ, reason="IMGSHARED_REAL_DATA is not set")
def test_real_image():
    image = open_image(Path(os.environ["IMGSHARED_REAL_DATA"]) / "bbbc013" / "A01.ome.tif")
    assert image.channels == ("DNA", "FKHR-EGFP")
    assert image.read().shape == image.shape == (2, 640, 640)
