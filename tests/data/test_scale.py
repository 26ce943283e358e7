"""The scale bar's length is round, and what it says is what it shows."""

import pytest

from imgshared.data.scale import scale_bar


@pytest.mark.parametrize(
    ("width", "size", "px", "says"),
    [
        (64, 0.5, 20, "10 µm"),  # a third is 10.7 µm
        (60, 0.5, 20, "10 µm"),  # exactly a third
        (59, 0.5, 10, "5 µm"),
        (16, 1.0, 5, "5 µm"),
        (640, 0.325, 50 / 0.325, "50 µm"),
        (64, None, 20, "20 px"),
        (16, 0.05, 20, "1 µm"),  # never less than 1, even where that is wider than the picture
    ],
)
def test_the_bar_is_round_and_at_most_a_third(width, size, px, says):
    assert scale_bar(width, size) == (pytest.approx(px), says)
