"""What is settled before a slide is predicted."""

from dataclasses import replace

import numpy as np
import pytest

from imgshared.config import SlideConfig
from imgshared.prediction.trust import load_trust
from imgshared.slides.job import settle
from imgshared.types import InputError


def test_intervals_of_a_stain_without_calibration_are_refused(calibrated, pixels, write_tiff, tmp_path):
    """Cast to the slide's dtype they would be zero, which reads as certain."""
    path, trust = write_tiff(tmp_path / "s.ome.tif", pixels), load_trust(calibrated.path)
    half = trust.pixel_half.copy()
    half[2] = np.nan
    replace(trust, pixel_half=half).save(calibrated.path / "trust.npz")
    with pytest.raises(
        InputError, match=r"no validation cell shows P2 beside .*; ask for markers=\[P1\], or leave it out"
    ):
        settle(calibrated, path, SlideConfig(intervals=True))
    assert settle(calibrated, path, SlideConfig(intervals=True, markers=("P1",))).targets == (1,)
    assert settle(calibrated, path, SlideConfig()).targets == (1, 2)
