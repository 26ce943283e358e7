"""A slide in, an image with predicted channels out."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
import zarr
from yaozarrs import v05

from imgshared import api
from imgshared.config import CutConfig, SlideConfig, TranslatorConfig, TranslatorWeights
from imgshared.data.ngff import open_ngff
from imgshared.evaluation.calibrate import calibrate
from imgshared.prediction import predict_image
from imgshared.prediction.trust import load_trust
from imgshared.slides import predict as module
from imgshared.slides import predict_slide
from imgshared.slides.job import clipped
from imgshared.slides.predict import PyramidWriter
from imgshared.types import InputError

SMALL = SlideConfig(tile=256)


def predicted(path):
    image = open_ngff(path)
    return image.read(range(image.shape[0]))


@pytest.mark.parametrize("kind", ["tiff", "zarr"])
def test_a_slide_is_predicted_as_the_whole_image_would_be(run, pixels, write_tiff, write_image, tmp_path, kind):
    names = ("DNA", "P1")
    if kind == "tiff":
        path = write_tiff(tmp_path / "s.ome.tif", pixels, names, compression="zlib")
    else:
        path = write_image(tmp_path / "s.ome.zarr", pixels, names)
    out = predict_slide(run, path, tmp_path / "out.ome.zarr", SMALL)
    image = open_ngff(out)
    assert image.channels == ("P1_imputed", "P2_imputed")
    assert (image.dtype, image.shape, image.pixel_size_um) == (np.uint16, (2, 700, 530), 0.5)
    whole = predict_image(run, pixels, names)
    np.testing.assert_array_equal(predicted(out), np.rint(whole).clip(0, 65535))
    assert list(tmp_path.glob("*.partial")) == []


def test_the_image_says_what_it_is(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", np.tile(pixels, (1, 2, 2)))
    out = predict_slide(run, path, tmp_path / "out.ome.zarr", SlideConfig(tile=512, measured=True))
    group = zarr.open_group(out, mode="r")
    known = v05.Image.model_validate(group.attrs["ome"])
    assert [c.label for c in known.omero.channels] == ["DNA", "P1", "P1_imputed", "P2_imputed"]
    looks = [(c.window.start, c.window.end) for c in known.omero.channels]
    assert looks[1] == looks[2]  # real and predicted in the same contrast
    assert {(c.window.min, c.window.max) for c in known.omero.channels} == {(0, 65535)}
    assert [c.color for c in known.omero.channels] == ["0072B2", "E69F00", "009E73", "CC79A7"]
    assert [a.shape for _, a in sorted(group.arrays())] == [(4, 1400, 1060), (4, 700, 530)]
    assert group["0"].shards == (1, 512, 512)
    np.testing.assert_array_equal(group["0"][:2], np.tile(pixels, (1, 2, 2)))
    means = group["0"][:].astype(float).reshape(4, 700, 2, 530, 2).mean((2, 4))
    assert np.abs(group["1"][:] - means).max() <= 0.5
    finest, coarser = (
        [t.model_dump(mode="json") for t in level.coordinateTransformations] for level in known.multiscales[0].datasets
    )
    assert finest == [{"type": "scale", "scale": [1, 0.5, 0.5]}, {"type": "translation", "translation": [0, 0, 0]}]
    # The middle of the first of the coarser pixels, between those of the four finer ones.
    assert coarser == [{"type": "scale", "scale": [1, 1, 1]}, {"type": "translation", "translation": [0, 0.25, 0.25]}]
    about = group.attrs["imgshared"]
    assert (about["imputed"], about["uncertainty"]) == (["P1_imputed", "P2_imputed"], [])
    assert about["sources"] == ["DNA"]
    assert len(about["checkpoint_sha256"]) == 64
    assert about["settings"]["tile"] == 512


def test_an_ome_tiff_holds_the_same(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", np.tile(pixels, (1, 2, 2)))
    beside = predict_slide(run, path, tmp_path / "out.ome.zarr", SlideConfig(measured=True))
    out = predict_slide(run, path, tmp_path / "out.ome.tif", SlideConfig(measured=True))
    with tifffile.TiffFile(out) as tiff:
        assert (tiff.is_ome, tiff.is_bigtiff, tiff.series[0].axes) == (True, True, "CYX")
        pyramid = [level.asarray() for level in tiff.series[0].levels]
        assert tiff.pages[0].is_tiled
        xml = tiff.ome_metadata
    for level, array in enumerate(pyramid):
        np.testing.assert_array_equal(array, zarr.open_group(beside, mode="r")[str(level)][:])
    assert len(pyramid) == 2
    found = tifffile.xml2dict(xml)["OME"]
    image = found["Image"]["Pixels"]
    assert [c["Name"] for c in image["Channel"]] == ["DNA", "P1", "P1_imputed", "P2_imputed"]
    assert image["PhysicalSizeX"] == 0.5
    kept = {m["K"]: m["value"] for m in found["StructuredAnnotations"]["MapAnnotation"]["Value"]["M"]}
    assert json.loads(kept["imputed"]) == ["P1_imputed", "P2_imputed"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ome.tif", "out.ome.zarr", "s.ome.tif"]


@pytest.mark.parametrize("method", ["translator", "cut"])
def test_the_tile_changes_nothing(run, untrained, pixels, write_tiff, tmp_path, method):
    run = run if method == "translator" else untrained(CutConfig(width=4, blocks=1, discriminator_channels=(4,)))
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    each = [
        predicted(predict_slide(run, path, tmp_path / f"{tile}.ome.zarr", SlideConfig(tile=tile, dtype="float32")))
        for tile in (256, 512, 1024)
    ]
    for one in each[1:]:
        np.testing.assert_allclose(one, each[0], atol=1e-5 * np.ptp(each[0]))


def test_sharp_and_intervals_and_fewer_markers(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    sharp = SlideConfig(sharp=True, markers=("P2",), dtype="float32")
    out = predict_slide(run, path, tmp_path / "sharp.ome.zarr", sharp)
    want = predict_image(run, pixels, ["DNA", "P1"], markers=["P2"], sharp=True)
    np.testing.assert_allclose(predicted(out), want, rtol=1e-5, atol=1e-2)
    out = predict_slide(run, path, tmp_path / "spread.ome.zarr", SlideConfig(intervals=True, dtype="float32"))
    assert open_ngff(out).channels == ("P1_imputed", "P2_imputed", "P1_imputed_uncertainty", "P2_imputed_uncertainty")
    about = zarr.open_group(out, mode="r").attrs["imgshared"]
    assert about["imputed"] == ["P1_imputed", "P2_imputed"]
    assert about["uncertainty"] == ["P1_imputed_uncertainty", "P2_imputed_uncertainty"]
    assert (predicted(out)[2:] > 0).all()
    with pytest.raises(InputError, match="no calibration for these sources and the mean output"):
        predict_slide(run, path, tmp_path / "x.ome.zarr", SlideConfig(intervals=True, sources=("DNA", "P1")))


@pytest.mark.parametrize("head", ["mean", "laplace"])
def test_uncertainties_are_the_half_widths_in_raw_units(untrained, toy, pixels, write_tiff, tmp_path, head):
    """By the predicted scale where there is one, else by the mean."""
    weights = TranslatorWeights(adversarial=0.0, sharp=0.0)
    config = TranslatorConfig(channels=(8, 12), marker_dim=4, head=head, weights=weights)
    (tmp_path / "run").mkdir()
    run = replace(untrained(config), path=tmp_path / "run")
    calibrate(run, toy)
    slide = pixels[:, :256, :256]
    path = write_tiff(tmp_path / "s.ome.tif", slide)
    out = predict_slide(run, path, tmp_path / "o.ome.zarr", SlideConfig(intervals=True, dtype="float32"))
    known, trust, given = run.normaliser, load_trust(run.path), torch.tensor([True, False, False])
    raw = torch.from_numpy(np.pad(slide[:1], ((0, 2), (0, 0), (0, 0))).astype(np.float32))
    with torch.inference_mode():
        guess = run.method.translate(known.forward(raw)[None] * given[:, None, None], given[None], (1, 2))
    assert (guess.scale is None) == (head == "mean")
    driver = (guess.mean if guess.scale is None else guess.scale)[0].numpy()
    for k, c in enumerate((1, 2)):
        want = trust.half_widths(driver[k], c) * (known.high[c] - known.low[c])
        assert len(np.unique(want)) > 4
        same = np.isclose(predicted(out)[2 + k], want, rtol=1e-3)
        assert same.mean() > 0.999  # a driver at a bin's edge may round into the next


def test_glass_is_neither_read_nor_predicted(run, pixels, write_tiff, tmp_path, monkeypatch):
    slide = np.zeros((2, 1536, 1536), np.uint16)
    slide[:, 300:800, 200:700] = pixels[:, :500, :500]
    path = write_tiff(tmp_path / "s.ome.tif", slide)
    drawn = []
    monkeypatch.setattr(PyramidWriter, "write", lambda self, n, *rest: drawn.append(n) or self.note(n))
    predict_slide(run, path, tmp_path / "none.ome.zarr", SlideConfig(tile=256, tissue="otsu"))
    monkeypatch.undo()
    assert set(drawn) <= {6 * r + c for r in range(4) for c in range(4)}
    each = []
    for tile in (256, 768):
        out = tmp_path / f"{tile}.ome.zarr"
        each.append(predicted(predict_slide(run, path, out, SlideConfig(tile=tile, tissue="otsu", dtype="float32"))))
    np.testing.assert_allclose(each[0], each[1], atol=1e-5 * np.ptp(each[0]))
    whole = predict_image(run, slide, ["DNA", "P1"])
    inside = (slice(None), slice(300, 800), slice(200, 700))
    np.testing.assert_allclose(each[0][inside], whole[inside], atol=1e-5 * np.ptp(whole))
    assert (each[0][:, 900:] == 0).all()


def test_what_was_measured_on_glass_stays(run, write_tiff, tmp_path):
    slide = np.random.default_rng(0).poisson(300, (2, 700, 530)).astype(np.uint16)
    path = write_tiff(tmp_path / "s.ome.tif", slide)
    mask = np.zeros((700, 530), np.uint8)
    mask[:300, :200] = 1  # beside it, tiles of glass alone, and tiles of both
    tifffile.imwrite(tmp_path / "m.tif", mask)
    each = []
    for tile in (256, 512):
        wish = SlideConfig(tile=tile, tissue=str(tmp_path / "m.tif"), measured=True, dtype="float32")
        each.append(predicted(predict_slide(run, path, tmp_path / f"{tile}.ome.zarr", wish)))
        np.testing.assert_array_equal(each[-1][:2], slide)
        assert not each[-1][2:, mask == 0].any()  # pixel by pixel
        assert each[-1][2:, mask == 1].all()
    np.testing.assert_allclose(each[0], each[1], atol=1e-5 * np.ptp(each[0]))


def test_a_mask_of_tissue_may_be_of_any_level(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels, levels=2)
    mask = np.zeros((350, 265), np.uint8)
    mask[:100, :50] = 1
    tifffile.imwrite(tmp_path / "m.tif", mask)
    out = predict_slide(run, path, tmp_path / "o.ome.zarr", SlideConfig(tissue=str(tmp_path / "m.tif")))
    whole = np.rint(predict_image(run, pixels, ["DNA", "P1"])).clip(0, 65535)
    np.testing.assert_array_equal(predicted(out)[:, :200, :100], whole[:, :200, :100])
    assert not predicted(out)[:, 200:].any()
    tifffile.imwrite(tmp_path / "wrong.tif", np.ones((100, 265), np.uint8))
    with pytest.raises(InputError, match=r"mask .*wrong.tif is 100 x 265 pixels, the levels of .* are 700 x 530, 350"):
        predict_slide(run, path, tmp_path / "x.ome.zarr", SlideConfig(tissue=str(tmp_path / "wrong.tif")))


def test_a_slide_may_set_its_own_brightness(run, pixels, write_tiff, tmp_path):
    own = SlideConfig(normaliser="slide", dtype="float32")
    plain = predicted(predict_slide(run, write_tiff(tmp_path / "a.ome.tif", pixels), tmp_path / "a.ome.zarr", own))
    path = write_tiff(tmp_path / "b.ome.tif", pixels * 7)
    brighter = predicted(predict_slide(run, path, tmp_path / "b.ome.zarr", own))
    np.testing.assert_allclose(brighter, plain, atol=1e-4 * np.ptp(plain))
    usual = predicted(predict_slide(run, path, tmp_path / "c.ome.zarr", SlideConfig(dtype="float32")))
    assert np.abs(usual - plain).max() > 0.1 * np.ptp(plain)
    path = write_tiff(tmp_path / "flat.ome.tif", pixels * 0)
    with pytest.raises(InputError, match="'DNA' is the same everywhere, so normaliser=slide cannot be fitted"):
        predict_slide(run, path, tmp_path / "d.ome.zarr", own)


def test_what_cannot_be_predicted_is_refused(run, trained_run, pixels, write_tiff, tmp_path):
    path, out = write_tiff(tmp_path / "s.ome.tif", pixels), tmp_path / "o.ome.zarr"
    with pytest.raises(InputError, match="apollo predicts crops of 16 px alone"):
        predict_slide(trained_run, path, out)
    masked = replace(run, contract=replace(run.contract, mask_neighbours=True))
    with pytest.raises(InputError, match="was trained on cells without their neighbours"):
        predict_slide(masked, path, out)
    with pytest.raises(InputError, match=r"dtype=uint8 does not hold the uint16 pixels of .*that measured=true writes"):
        predict_slide(run, path, out, SlideConfig(measured=True, dtype="uint8"))
    with pytest.raises(InputError, match="is, holds or lies in the slide"):
        predict_slide(run, path, path)
    (tmp_path / "notes").mkdir()
    with pytest.raises(InputError, match="notes exists already"):
        predict_slide(run, path, tmp_path / "notes")
    with pytest.raises(InputError, match="notes is no image, so it is not replaced"):
        predict_slide(run, path, tmp_path / "notes", overwrite=True)
    predict_slide(run, path, out)
    with pytest.raises(InputError, match="exists already"):
        predict_slide(run, path, out)
    assert predict_slide(run, path, out, overwrite=True) == out


def test_the_api_tells_slides_from_stores(run, toy_path, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels)
    with pytest.warns(UserWarning, match="on the validation groups"):
        out = api.predict(run, path, tmp_path / "o.ome.zarr", markers=["P2"])
    assert open_ngff(out).channels == ("P2_imputed",)
    with pytest.raises(InputError, match=r"PredictConfig.*tile"):
        api.predict(run, toy_path, tmp_path / "p.zarr", tile=512)


def test_a_dtype_that_cuts_predictions_off_is_warned_of(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels[:, :256, :256])
    with pytest.warns(
        UserWarning, match=r"dtype=uint8 cuts predictions off at 255, .* brighter: P1 \(\d+\), P2 \(\d+\)\."
    ):
        api.predict(run, path, tmp_path / "o.ome.zarr", dtype="uint8")
    assert clipped(run, SlideConfig(dtype="uint8", markers=("P2",)))[0].count("P1") == 0
    for wide in ("auto", "uint16", "float32"):
        assert clipped(run, SlideConfig(dtype=wide)) == []
    dim = replace(run.normaliser, high=(255.0,) * 3)
    assert clipped(replace(run, contract=replace(run.contract, normaliser=dim)), SlideConfig(dtype="uint8")) == []


def test_a_tile_is_read_while_one_is_predicted_and_another_written(run, pixels, write_tiff, tmp_path, monkeypatch):
    """Tile k waits, while it is predicted, for the reading of tile k + 1 and the writing of tile k - 1 to begin."""
    path = write_tiff(tmp_path / "s.ome.tif", pixels[:, :512, :512])  # four tiles
    begun = {(kind, k): threading.Event() for kind in ("read", "write") for k in range(4)}
    alone = []
    read, draw, write = module._read, module._drawn, module._write

    def reads(job, tile, readers):
        begun["read", len([k for k in range(4) if begun["read", k].is_set()])].set()
        return read(job, tile, readers)

    def draws(job, damage, tile, waiting):
        number = tile[0]
        for neighbour in (("read", number + 1), ("write", number - 1)):
            if neighbour in begun and not begun[neighbour].wait(20):
                alone.append((number, *neighbour))
        return draw(job, damage, tile, waiting)

    def writes(writer, number, span, tile):
        begun["write", number].set()
        write(writer, number, span, tile)

    for name, replacement in (("_read", reads), ("_drawn", draws), ("_write", writes)):
        monkeypatch.setattr(module, name, replacement)
    predict_slide(run, path, tmp_path / "out.ome.zarr", SMALL)
    assert alone == []
    assert all(event.is_set() for event in begun.values())
