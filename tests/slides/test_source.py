"""Slides on the model's grid."""

import numpy as np
import pytest

from imgshared.config import SlideConfig
from imgshared.data.crops import resample
from imgshared.slides.source import Resampled, open_slide
from imgshared.types import InputError


@pytest.mark.parametrize("shape", [(350, 265), (933, 707), (512, 530)])
@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_resampled_windows_are_parts_of_the_resampled_image(pixels, shape, kind):
    image = pixels.astype(kind)
    whole = resample(image, shape)
    read = Resampled(lambda rows, columns: image[:, rows, columns], image.shape[1:], shape)
    for rows, columns in (
        (slice(0, 100), slice(0, 90)),
        (slice(61, 200), slice(97, 265)),
        (slice(300, 350), slice(5, 9)),
    ):
        np.testing.assert_allclose(read(rows, columns), whole[:, rows, columns], atol=1 if kind is np.uint16 else 0.05)
    assert read(slice(0, 9), slice(0, 9)).dtype == kind


def test_the_level_of_the_models_pixel_size_is_read(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels, size=0.25, levels=3)
    slide = open_slide(run, path, SlideConfig())
    assert (slide.level, slide.shape, slide.pixel_size_um) == (1, (350, 265), 0.5)
    with slide.reader(["DNA"]) as read:
        np.testing.assert_array_equal(read(slice(10, 20), slice(30, 50))[0], pixels[0, 20:40:2, 60:100:2])


def test_another_pixel_size_is_resampled_on_request_alone(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels, size=0.2, levels=2)
    with pytest.raises(InputError, match=r"has pixels of 0.2, 0.4 µm, the model was trained at 0.5 µm: resample=true"):
        open_slide(run, path, SlideConfig())
    slide = open_slide(run, path, SlideConfig(resample=True))
    assert (slide.level, slide.shape, slide.pixel_size_um) == (1, (280, 212), 0.5)  # from the nearest finer level
    with slide.reader(["DNA", "P1"]) as read:
        want = resample(np.ascontiguousarray(pixels[:, ::2, ::2]), (280, 212))
        np.testing.assert_allclose(read(slice(0, 280), slice(0, 212)).astype(int), want, atol=1)
    coarse = write_tiff(tmp_path / "coarse.ome.tif", pixels, size=1.0)
    assert open_slide(run, coarse, SlideConfig(resample=True)).shape == (1400, 1060)


def test_an_unknown_pixel_size_must_be_told(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels, size=None)
    with pytest.raises(InputError, match=r"does not say its pixel size, and the model was trained at 0.5 µm"):
        open_slide(run, path, SlideConfig())
    assert open_slide(run, path, SlideConfig(pixel_size_um=0.5)).shape == (700, 530)


def test_a_wish_goes_before_the_header(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels, names=("Nucleus", "P1"), size=0.3, levels=2)
    with pytest.raises(InputError, match=r"has no DNA.*it has Nucleus, P1.*channels=\[...\] names them in file order"):
        open_slide(run, path, SlideConfig())
    with pytest.raises(InputError, match=r"has pixels of 0.3, 0.6 µm.*pixel_size_um=... corrects it"):
        open_slide(run, path, SlideConfig(channels=("DNA", "P1")))
    slide = open_slide(run, path, SlideConfig(channels=("DNA", "P1"), pixel_size_um=0.25))
    assert (slide.level, slide.shape, slide.pixel_size_um) == (1, (350, 265), 0.5)
    assert slide.channels == {0: "DNA", 1: "P1"}
    with slide.reader(["DNA"]) as read:
        np.testing.assert_array_equal(read(slice(10, 20), slice(30, 50))[0], pixels[0, 20:40:2, 60:100:2])
    with pytest.raises(InputError, match=r"holds 2 channel\(s\), but channels=\[...\] names 1: DNA"):
        open_slide(run, path, SlideConfig(channels=("DNA",)))
    with pytest.raises(InputError, match=r"channels=\[...\] names DNA, dna twice"):
        open_slide(run, path, SlideConfig(channels=("DNA", "dna")))


def test_a_slide_must_carry_the_sources(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", pixels, names=("DNAA", "CD3"))
    with pytest.raises(
        InputError, match=r"has no DNA, which the prediction starts from; it has DNAA, CD3. Did you mean"
    ):
        open_slide(run, path, SlideConfig())
    path = write_tiff(tmp_path / "imputed.ome.tif", pixels, names=("DNA_imputed", "P1"))
    with pytest.raises(InputError, match="has no DNA"):
        open_slide(run, path, SlideConfig())  # what was predicted is not taken for measured
    path = write_tiff(tmp_path / "p1.ome.tif", pixels, names=("DNA", "CD3"))
    with pytest.raises(InputError, match="has no P1"):
        open_slide(run, path, SlideConfig(sources=("DNA", "P1")))


def test_another_kind_of_pixels_is_refused(run, pixels, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", (pixels // 8).astype(np.uint8))
    with pytest.raises(InputError, match="has uint8 pixels, the model was trained on uint16"):
        open_slide(run, path, SlideConfig())
