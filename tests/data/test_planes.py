"""Windows of a TIFF take the memory and the time of the window."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile

from imgshared.data import planes
from imgshared.data.readers import open_image
from imgshared.data.windows import plan_tiles, windows

NAMES = ("DNA", "P")


def pixels(side=300):
    return np.random.default_rng(0).integers(0, 4000, (2, side, side)).astype(np.uint16)


def one_strip(path, data):
    """Planes that are compressed in one piece."""
    with tifffile.TiffWriter(path) as writer:
        for plane in data:
            writer.write(plane, compression="zlib", rowsperstrip=len(plane), contiguous=False)
    return open_image(path, names=NAMES)


def tile_by_tile(image, names=NAMES):
    """Read all of some channels by windows."""
    out = np.zeros((len(names), *image.shape[1:]), image.dtype)
    with windows(image, names) as read:
        for rows, columns in plan_tiles(image.shape[1:], 100):
            out[:, rows, columns] = read(rows, columns)
    return out


@pytest.fixture
def decoded(monkeypatch):
    """Count what is decoded, where 100 kB are large."""
    monkeypatch.setattr(planes, "LARGE", 100_000)
    found, decode = [], planes.Coded._decode
    monkeypatch.setattr(planes.Coded, "_decode", lambda self, index: found.append(index) or decode(self, index))
    return found


def test_a_large_strip_is_decoded_once_and_told_of_once(tmp_path, decoded):
    image = one_strip(tmp_path / "a.tif", pixels())
    with pytest.warns(UserWarning, match=r"a\.tif lies in strips or tiles of .*Rewrite it in small tiles") as told:
        np.testing.assert_array_equal(tile_by_tile(image), pixels())
    assert len(told) == 1
    assert len(decoded) == 2  # planes, of 9 windows each


def test_large_strips_are_kept_while_there_is_room(tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(planes, "KEPT", 200_000)  # a plane is 180 kB
    image = one_strip(tmp_path / "a.tif", pixels())
    with pytest.warns(UserWarning, match="small tiles"):
        np.testing.assert_array_equal(tile_by_tile(image), pixels())
    assert len(decoded) == 18
    decoded.clear()
    with pytest.warns(UserWarning, match="small tiles"):
        tile_by_tile(image, ["P"])
    assert len(decoded) == 1


def test_no_word_of_what_is_tiled_or_read_whole(tmp_path, decoded):
    image = one_strip(tmp_path / "a.tif", pixels())
    tifffile.imwrite(tmp_path / "b.tif", pixels(), compression="zlib", tile=(64, 64), photometric="minisblack")
    tifffile.imwrite(tmp_path / "c.tif", pixels(), photometric="minisblack")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image.read()
        for name in "bc":
            tile_by_tile(open_image(tmp_path / f"{name}.tif", names=NAMES))


def test_tiles_in_jpeg(tmp_path):
    data = (pixels() // 16).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", data, compression="jpeg", tile=(64, 64), photometric="minisblack")
    image = open_image(tmp_path / "a.tif", names=NAMES)
    np.testing.assert_array_equal(tile_by_tile(image), tifffile.imread(tmp_path / "a.tif"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_plain_file_is_not_held_in_memory(tmp_path, contiguous):
    """Two planes of 32 MB, of which mapped pages would stay resident."""

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    plane = np.arange(4096**2, dtype=np.uint32).reshape(4096, 4096).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for _ in NAMES:
            writer.write(plane, contiguous=contiguous)
    image = open_image(tmp_path / "a.tif", names=NAMES)
    with windows(image, NAMES) as read:
        before = resident()
        for rows, columns in plan_tiles(image.shape[1:], 1024):
            np.testing.assert_array_equal(read(rows, columns)[1], plane[rows, columns])
        assert resident() - before < 8e6
