"""Slides that cannot be read everywhere."""

from dataclasses import replace

import anndata
import numpy as np
import pytest
import tifffile
import zarr

from imgshared.config import SlideConfig
from imgshared.data.ngff import open_ngff
from imgshared.prediction import predict_image
from imgshared.slides import predict as module
from imgshared.slides import predict_slide
from imgshared.slides.job import settle
from imgshared.slides.place import partial_of
from imgshared.slides.source import open_slide
from imgshared.slides.tissue import find_tissue
from imgshared.types import InputError

HOLE = [512, 700, 256, 512]
SKIP = SlideConfig(tile=256, skip_damaged=True)


def break_chunk(path, channel=0):
    """Rows 512 to 543, columns 320 to 351 of a channel are no Blosc or Zstandard any more."""
    chunk = path / "0" / "c" / str(channel) / "16" / "10"
    assert chunk.exists()
    chunk.write_bytes(b"nothing")
    return path


def break_tile(path, page=0, tile=13):
    """Rows 256 to 383, columns 384 to 511 of a channel of a TIFF in tiles of 128 px."""
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[page].dataoffsets[tile], tiff.pages[page].databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    return path


@pytest.fixture
def damaged(pixels, write_image, tmp_path):
    """A slide whose DNA has a damaged chunk."""
    return break_chunk(write_image(tmp_path / "s.ome.zarr", pixels, ("DNA", "P1")))


def predicted(path):
    image = open_ngff(path)
    return image.read(range(image.shape[0]))


def about(path):
    return zarr.open_group(path, mode="r").attrs["imgshared"]


def outside(block, shape=(700, 530)):
    keep = np.ones(shape, bool)
    keep[block[0] : block[1], block[2] : block[3]] = False
    return keep


def test_a_damaged_chunk_is_named(run, damaged, tmp_path):
    with pytest.raises(
        InputError,
        match=r"channel 'DNA' of .*s.ome.zarr is damaged at rows 512 to 544, columns 256 to 512 .*skip_damaged=true",
    ):
        predict_slide(run, damaged, tmp_path / "o.ome.zarr", SlideConfig(tile=256))


@pytest.mark.parametrize("tile", [256, 512])
def test_the_rest_survives_on_request(run, pixels, damaged, tmp_path, tile):
    wish = SlideConfig(tile=tile, skip_damaged=True, dtype="float32")
    out = predict_slide(run, damaged, tmp_path / "o.ome.zarr", wish)
    image, (rim,), margin = predicted(out), about(out)["unpredicted"], about(out)["margin_px"]
    assert about(out)["damaged"] == [HOLE]
    assert rim == [512 - margin, 700, 256 - margin, 530]  # all that would have seen the hole
    assert not image[:, rim[0] : rim[1], rim[2] : rim[3]].any()
    whole = predict_image(run, pixels, ["DNA", "P1"])
    keep = outside(rim)
    np.testing.assert_allclose(image[:, keep], whole[:, keep], atol=1e-5 * np.ptp(whole))
    assert sorted(p.name for p in out.iterdir()) == ["0", "zarr.json"]


def test_a_hole_in_a_channel_that_is_only_copied_costs_no_prediction(run, pixels, write_image, tmp_path):
    path = break_chunk(write_image(tmp_path / "s.ome.zarr", pixels, ("DNA", "P1")), channel=1)
    with pytest.raises(InputError, match=r"channel 'P1' of .*s.ome.zarr is damaged at rows 512 to 700"):
        predict_slide(run, path, tmp_path / "x.ome.zarr", SlideConfig(measured=True))
    wish = SlideConfig(measured=True, skip_damaged=True)
    out = predict_slide(run, path, tmp_path / "o.ome.zarr", wish)
    image, whole = predicted(out), np.rint(predict_image(run, pixels, ["DNA", "P1"])).clip(0, 65535)
    assert (about(out)["damaged"], about(out)["unpredicted"]) == ([HOLE], [])
    np.testing.assert_array_equal(image[2:], whole)
    np.testing.assert_array_equal(image[1], np.where(outside(HOLE), pixels[1], 0))


def test_all_that_looks_at_a_slide_skips_what_is_damaged(run, pixels, damaged, write_image, tmp_path):
    mask = np.zeros((700, 530), np.uint8)
    for label, (y, x) in enumerate(((100, 100), (600, 350), (460, 100), (600, 515)), 1):
        mask[y : y + 12, x : x + 12] = label
    tifffile.imwrite(tmp_path / "m.tif", mask)
    for wish in ({"tissue": "otsu"}, {"normaliser": "slide"}):
        with pytest.raises(InputError, match=r"channel 'DNA' of .* is damaged at rows 512 to 700.*skip_damaged=true"):
            settle(run, damaged, SlideConfig(**wish))
    wish = {"tissue": "otsu", "normaliser": "slide", "cells": str(tmp_path / "m.tif"), "skip_damaged": True}
    out = predict_slide(run, damaged, tmp_path / "o.ome.zarr", SlideConfig(tile=256, **wish))
    table = anndata.read_zarr(tmp_path / "o.cells.zarr")
    np.testing.assert_array_equal(np.isnan(table.X[:, :2]).any(1), [False, True, False, False])  # in the hole
    np.testing.assert_array_equal(np.isnan(table.X[:, 2:]).any(1), [False, True, False, True])  # and in its rim
    assert about(out)["damaged"] == [HOLE]
    (rim,) = about(out)["unpredicted"]
    assert not predicted(out)[:, rim[0] : rim[1], rim[2] : rim[3]].any()
    assert settle(run, damaged, SlideConfig(normaliser="slide", skip_damaged=True)).run.normaliser.low[0] > 0  # no zero


def test_what_is_damaged_on_the_thumbnail_alone_counts_as_tissue(run, write_image, tmp_path, monkeypatch):
    monkeypatch.setattr("imgshared.slides.tissue.THUMBNAIL", 512)
    slide = np.zeros((2, 1536, 1536), np.uint16)
    slide[:, :400, :400] = np.random.default_rng(0).poisson(500, (2, 400, 400))
    path = write_image(tmp_path / "s.ome.zarr", slide, ("DNA", "P1"))
    chunk = path / "1" / "c" / "0" / "20" / "20"
    chunk.parent.mkdir()
    chunk.write_bytes(b"nothing")
    tissue = find_tissue(open_slide(run, path, SlideConfig()), "DNA", skip_damaged=True)
    mask = tissue.within(slice(0, 1536), slice(0, 1536))
    assert mask[:400, :400].all()
    assert mask[1100:1500, 1100:1500].all()
    assert not mask[:400, 600:].any()
    assert not mask[700:1000, 700:1000].any()


def test_a_kill_in_the_pyramid_forgets_no_damage(run, damaged, tmp_path, monkeypatch):
    out = tmp_path / "o.ome.zarr"
    for place in ("finish", "forget"):

        def stop(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(module.PyramidWriter, place, stop)
            with pytest.raises(KeyboardInterrupt):
                predict_slide(run, damaged, out, SKIP)
        assert partial_of(out).exists()
    predict_slide(run, damaged, out, SKIP)
    assert about(out)["damaged"] == [HOLE]


def test_a_damaged_tile_of_a_tiff_is_named_and_left_out(run, pixels, write_tiff, tmp_path):
    path = break_tile(write_tiff(tmp_path / "s.ome.tif", pixels, compression="zlib"))
    place = r"channel 'DNA' of .*s.ome.tif is damaged at rows 256 to 512, columns 256 to 512 .*skip_damaged=true"
    with pytest.raises(InputError, match=place):
        predict_slide(run, path, tmp_path / "x.ome.zarr", SlideConfig())
    out = predict_slide(run, path, tmp_path / "o.ome.zarr", SlideConfig(skip_damaged=True, dtype="float32"))
    assert about(out)["damaged"] == [[256, 512, 256, 512]]
    whole, keep = predict_image(run, pixels, ["DNA", "P1"]), outside(about(out)["unpredicted"][0])
    np.testing.assert_allclose(predicted(out)[:, keep], whole[:, keep], atol=1e-5 * np.ptp(whole))


def test_a_pyramid_that_is_cut_off_is_refused_by_name(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", np.tile(pixels, (1, 2, 2)), levels=3, compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        last = max(o for page in tiff.series[0].levels[2].pages for o in page.dataoffsets)
        first = min(o for page in tiff.series[0].levels[1].pages for o in page.dataoffsets)
    whole = path.read_bytes()
    for k, size in enumerate((last, (first + last) // 2, first)):
        cut = tmp_path / f"cut{k}.ome.tif"
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"cut{k}.ome.tif"):
            predict_slide(run, cut, tmp_path / "o.ome.zarr", SlideConfig())
    assert not (tmp_path / "o.ome.zarr").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -5.0])
def test_floats_that_are_no_intensities_are_named(run, pixels, write_tiff, tmp_path, bad):
    floats = replace(run, contract=replace(run.contract, dtype="float32"))
    image = pixels.astype(np.float32)
    image[0, 300, 400] = bad
    path = write_tiff(tmp_path / "s.ome.tif", image)
    kind = "negative" if bad == -5 else "NaN or infinite"
    place = f"channel 'DNA' holds .*{kind} pixels.* at rows 256 to 512, columns 256 to 512.*skip_damaged=true"
    for wish in ({}, {"tissue": "otsu"}, {"normaliser": "slide"}):
        with pytest.raises(InputError, match=place):
            predict_slide(floats, path, tmp_path / f"{len(wish)}.ome.zarr", SlideConfig(**wish))
    out = predict_slide(floats, path, tmp_path / "o.ome.zarr", SlideConfig(skip_damaged=True))
    assert about(out)["damaged"] == [[256, 512, 256, 512]]
    whole = predict_image(floats, pixels.astype(np.float32), ["DNA", "P1"])
    keep = outside(about(out)["unpredicted"][0])
    np.testing.assert_allclose(predicted(out)[:, keep], whole[:, keep], atol=1e-5 * np.ptp(whole))
