"""The report's gallery: what is shown, and in which columns."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from imgshared.evaluation.figures import Example, gallery

VIRIDIS = {"sure": (68, 1, 84), "unsure": (253, 231, 37)}  # both ends of the colour map
COLUMN, LEFT = 1.35 * 150, 0.95 * 150  # px


def drawn(uncertainty):
    """A gallery of three cells, (Y, X, 3)."""
    rng = np.random.default_rng(0)
    images = rng.random((3, 3, 16, 16)).astype(np.float32)
    examples = [
        Example(*image, half.astype(np.float32), "r 0.5") for image, half in zip(images, uncertainty, strict=True)
    ]
    url = gallery("CD45", "DNA", examples, 0.5)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def test_uncertainty_is_a_column_from_zero_to_its_greatest_value():
    half = np.zeros((3, 16, 16))
    half[1, :8] = 0.3
    picture = drawn(half)
    column = picture[:, round(LEFT + 4 * COLUMN) :]
    cells = {name: (np.abs(column.astype(int) - colour).max(-1) <= 2).sum() for name, colour in VIRIDIS.items()}
    assert cells["sure"] / cells["unsure"] == pytest.approx(5, rel=0.05)  # two and a half cells and a half


def test_without_calibration_there_is_no_such_column_and_a_cell_without_it_is_left_white():
    none = np.full((3, 16, 16), np.nan)
    assert drawn(none).shape[1] == pytest.approx(LEFT + 4 * COLUMN, abs=2)
    partly = none.copy()
    partly[1:] = 0.1
    picture = drawn(partly)
    assert picture.shape[1] == pytest.approx(LEFT + 5 * COLUMN, abs=2)
    top = picture[round(0.34 * 150) + 5 : round((0.34 + 1.3) * 150) - 5, round(LEFT + 4 * COLUMN) + 5 : -15]
    assert (top == 255).all()
