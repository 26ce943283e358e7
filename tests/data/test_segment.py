import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from imgshared.data.segment import SegmentSettings, length_px, segment_nuclei, subtract_background
from imgshared.types import InputError


def discs(centres, radius=9, side=160, level=150.0):
    y, x = np.mgrid[:side, :side]
    image = np.full((side, side), 10.0)
    for cy, cx in centres:
        image[(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = level
    image = ndimage.gaussian_filter(image, 1)
    return np.random.default_rng(0).poisson(image).astype(np.uint16)


SMALL = SegmentSettings(background="30 px", min_diameter="8 px", max_diameter="40 px")


@pytest.mark.parametrize("threshold", ["otsu", "li", "local"])
def test_finds_every_nucleus_where_it_is(threshold):
    centres = [(30, 30), (35, 80), (100, 60), (120, 130)]
    labels = segment_nuclei(discs(centres), SegmentSettings(**{**vars(SMALL), "threshold": threshold}))
    assert labels.max() == len(centres)
    found = sorted(ndimage.center_of_mass(labels > 0, labels, range(1, 5)))
    np.testing.assert_allclose(found, centres, atol=1)
    areas = np.bincount(labels.ravel())[1:]
    np.testing.assert_allclose(areas, np.pi * 81, rtol=0.3)


def test_touching_nuclei_are_split_and_lone_ones_are_not():
    assert segment_nuclei(discs([(60, 60), (60, 76), (120, 100)]), SMALL).max() == 3


def test_uneven_background_does_not_matter():
    centres = [(30, 30), (30, 130), (130, 30), (130, 130)]
    slope = np.linspace(0, 300, 160, dtype=np.uint16)[None]
    assert segment_nuclei(discs(centres) + slope, SMALL).max() == 4
    flat = subtract_background(np.full((50, 50), 7, np.float32), 10)
    np.testing.assert_allclose(flat, 0, atol=1e-4)


def test_size_limits():
    image = np.maximum(discs([(40, 40)], radius=3), discs([(110, 110)], radius=12))
    sizes = {"min_diameter": "12 px", "max_diameter": "60 px"}
    labels = segment_nuclei(image, SegmentSettings(background="40 px", **sizes))
    assert labels.max() == 1
    assert labels[110, 110] == 1


def test_a_lower_threshold_finds_a_dimmer_nucleus():
    image = np.maximum(discs([(40, 40)]), discs([(110, 110)], level=40.0))
    scales = [segment_nuclei(image, SegmentSettings(**{**vars(SMALL), "threshold_scale": s})).max() for s in (1.0, 0.3)]
    assert scales == [1, 2]


def test_empty_image_has_no_nuclei():
    assert segment_nuclei(np.full((64, 64), 5, np.uint8), SMALL).max() == 0


@pytest.mark.parametrize(
    ("text", "pixel_size", "expected"), [("12 px", None, 12), ("6 um", 0.5, 12), ("6.5µm", 0.5, 13)]
)
def test_lengths(text, pixel_size, expected):
    assert length_px(text, pixel_size) == expected


def test_lengths_that_cannot_be():
    with pytest.raises(InputError, match=r"'6 um'.*source_pixel_size_um"):
        length_px("6 um", None)
    with pytest.raises(InputError, match="'6 feet' is not a length"):
        length_px("6 feet", 1.0)


@pytest.mark.skipif("IMGSHARED_REAL_DATA" not in os.environ, reason="IMGSHARED_REAL_DATA is not set")
def test_real_u2os_nuclei():
    dna = tifffile.imread(Path(os.environ["IMGSHARED_REAL_DATA"]) / "bbbc013" / "E07.ome.tif")[0]
    settings = SegmentSettings(background="30 px", threshold="local", min_diameter="9 px", max_diameter="40 px")
    labels = segment_nuclei(dna, settings)
    assert 160 <= labels.max() <= 195  # counted by eye: about 175
    diameters = np.sqrt(4 / np.pi * np.bincount(labels.ravel())[1:])
    assert 14 < np.median(diameters) < 20
