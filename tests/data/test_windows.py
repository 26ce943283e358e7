"""Windows equal what is read whole, whatever lies on disk; damage is named with its place."""

import numpy as np
import pytest
import tifffile

from imgshared.data.readers import open_image
from imgshared.data.windows import level_shapes, windows
from imgshared.types import InputError

NAMES = ("DNA", "LaminB1", "CD45")
AT = slice(70, 130), slice(33, 210)


def pixels():
    return np.random.default_rng(0).integers(0, 4000, (3, 200, 260)).astype(np.uint16)


def write_pyramid(path, data, **options):
    """An OME-TIFF of two levels."""
    options = {"tile": (64, 64), "photometric": "minisblack", **options}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(data, subifds=1, metadata={"axes": "CYX", "Channel": {"Name": list(NAMES)}}, **options)
        writer.write(data[:, ::2, ::2], subfiletype=1, **options)
    return path


def flat(path, data, **options):
    tifffile.imwrite(
        path, data, photometric="minisblack", metadata={"axes": "CYX", "Channel": {"Name": list(NAMES)}}, **options
    )
    return path


def interleaved(path, data, **options):
    tifffile.imwrite(path, data.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig", **options)
    return path


def planar(path, data, **options):
    tifffile.imwrite(path, data, photometric="rgb", planarconfig="separate", **options)
    return path


def page_by_page(path, data, **options):
    with tifffile.TiffWriter(path) as writer:
        for plane in data:
            writer.write(plane, photometric="minisblack", contiguous=False, **options)
    return path


def one_header(path, data):
    """As ImageJ writes stacks of more than 4 GB."""
    tifffile.imwrite(path, data, imagej=True, truncate=True, metadata={"axes": "CYX"})
    assert len(tifffile.TiffFile(path).pages) == 1
    return path


def row_by_row(path, data, **options):
    tifffile.imwrite(path, data.transpose(1, 2, 0), photometric="minisblack", metadata={"axes": "YXC"}, **options)
    assert len(tifffile.TiffFile(path).pages) == 200
    return path


WRITERS = {
    "page by page": (page_by_page, "a.tif"),
    "page by page, coded": (lambda path, data: page_by_page(path, data, compression="zlib"), "a.tif"),
    "pyramid": (lambda path, data: write_pyramid(path, data, compression="deflate"), "a.ome.tif"),
    "tiled": (lambda path, data: flat(path, data, tile=(32, 48)), "a.ome.tif"),
    "strips": (lambda path, data: flat(path, data, compression="lzw", rowsperstrip=16), "a.ome.tif"),
    "as it is": (flat, "a.ome.tif"),
    "big-endian": (lambda path, data: flat(path, data, byteorder=">"), "a.ome.tif"),
    "interleaved": (interleaved, "a.tif"),
    "interleaved, coded": (lambda path, data: interleaved(path, data, compression="zlib", tile=(64, 48)), "a.tif"),
    "planar": (planar, "a.tif"),
    "planar, coded": (lambda path, data: planar(path, data, compression="zlib", rowsperstrip=30), "a.tif"),
    "one header": (one_header, "a.tif"),
    "row by row": (row_by_row, "a.tif"),
    "row by row, coded": (lambda path, data: row_by_row(path, data, compression="zlib"), "a.tif"),
}


@pytest.fixture
def writers(write_image):
    return WRITERS | {"zarr": (lambda path, data: write_image(path, data, names=NAMES), "a.ome.zarr")}


@pytest.mark.parametrize("kind", [*WRITERS, "zarr"])
def test_a_window_is_part_of_the_whole(tmp_path, kind, writers):
    write, name = writers[kind]
    data = pixels()
    path = write(tmp_path / name, data)
    image = open_image(path, names=NAMES if name == "a.tif" else ())
    with windows(image, ["CD45", "DNA"]) as read:
        found = read(*AT)
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, data[[2, 0]][:, AT[0], AT[1]])
        np.testing.assert_array_equal(read(slice(0, 200), slice(0, 260)), data[[2, 0]])
    assert level_shapes(path)[0] == (200, 260)


@pytest.mark.parametrize("kind", ["pyramid", "zarr"])
def test_a_coarser_level_is_read_alone(tmp_path, kind, writers):
    write, name = writers[kind]
    data = pixels()
    path = write(tmp_path / name, data)
    assert level_shapes(path) == [(200, 260), (100, 130)]
    with windows(open_image(path), ["LaminB1"], level=1) as read:
        np.testing.assert_array_equal(read(slice(10, 40), slice(0, 20))[0], data[1, ::2, ::2][10:40, :20])


def test_one_file_a_channel(tmp_path):
    data = pixels()
    for plane, name in zip(data, NAMES, strict=True):
        tifffile.imwrite(tmp_path / f"{name}.tif", plane, compression="lzw", tile=(64, 64))
    image = open_image(tmp_path, pattern="{channel}.tif")
    with windows(image, NAMES) as read:
        np.testing.assert_array_equal(read(*AT), data[:, AT[0], AT[1]])


def test_a_corrupt_part_is_named_and_the_rest_is_read(tmp_path, write_image):
    data = pixels()
    path = write_image(tmp_path / "a.zarr", data, names=NAMES)
    (chunk,) = (path / "0" / "c" / "1" / "2").glob("1")
    chunk.write_bytes(b"broken")
    with windows(open_image(path), ["LaminB1"]) as read:
        with pytest.raises(InputError, match="damaged at rows 64 to 96, columns 32 to 64"):
            read(slice(64, 96), slice(32, 64))
        np.testing.assert_array_equal(read(slice(0, 64), slice(0, 64))[0], data[1, :64, :64])


def test_what_is_no_slide(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="no slide"):
        level_shapes(tmp_path / "a.txt")
