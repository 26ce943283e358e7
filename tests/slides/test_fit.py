"""A slide's own percentiles take the place of the training's, for the stains that are predicted from."""

import numpy as np
import pytest
import tifffile

from imgshared.config import SlideConfig
from imgshared.slides import fit
from imgshared.slides.job import settle

ENDS = (0.1, 99.9)


@pytest.fixture
def uneven(pixels):
    """Three times as bright in its left half."""
    pixels[:, :, :265] *= 3
    return pixels


@pytest.mark.parametrize("side", [2048, 256])
def test_a_sources_percentiles_are_those_of_the_whole_slide(run, uneven, write_tiff, tmp_path, monkeypatch, side):
    monkeypatch.setattr(fit, "SIDE", side)
    path = write_tiff(tmp_path / "s.ome.tif", uneven)
    found = settle(run, path, SlideConfig(normaliser="slide")).run.normaliser
    assert (found.low[0], found.high[0]) == pytest.approx(np.percentile(uneven[0], ENDS), abs=1)
    assert (found.low[1:], found.high[1:]) == (run.normaliser.low[1:], run.normaliser.high[1:])


def test_every_source_is_fitted_in_its_own_place(run, uneven, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", uneven[::-1], names=("P2", "DNA"))
    wish = SlideConfig(normaliser="slide", sources=("DNA", "P2"))
    found = settle(run, path, wish).run.normaliser
    for channel, plane in ((0, uneven[0]), (2, uneven[1])):
        assert (found.low[channel], found.high[channel]) == pytest.approx(np.percentile(plane, ENDS), abs=1)
    assert (found.low[1], found.high[1]) == (run.normaliser.low[1], run.normaliser.high[1])


def test_percentiles_are_those_of_the_tissue(run, uneven, write_tiff, tmp_path):
    path = write_tiff(tmp_path / "s.ome.tif", uneven)
    mask = np.zeros((700, 530), np.uint8)
    mask[:, 265:] = 1
    tifffile.imwrite(tmp_path / "m.tif", mask)
    wish = SlideConfig(normaliser="slide", tissue=str(tmp_path / "m.tif"))
    found = settle(run, path, wish).run.normaliser
    assert (found.low[0], found.high[0]) == pytest.approx(np.percentile(uneven[0][mask > 0], ENDS), abs=1)
    assert found.high[0] < np.percentile(uneven[0], 99.9) / 2
    assert (found.low[1:], found.high[1:]) == (run.normaliser.low[1:], run.normaliser.high[1:])
