"""The simulated microscope, one light at a time: what leaks into which channel, and how the field is lit."""

import numpy as np
import pytest

from imgshared.data.optics import (
    BATCH_EFFECTS,
    BLEED_THROUGH,
    COUNTS_PER_PHOTON,
    PANELS,
    STAINS,
    illumination,
    photograph,
)

SIDE = 256
MIDDLE = slice(64, -64)  # further in than light from outside the field is missed


def counts(batch: str, lit: str | None, brightness: float = 1.0) -> np.ndarray:
    """Mean counts of each channel, with one stain lit all over the field."""
    markers = PANELS[batch]
    light = {m: np.full((SIDE, SIDE), float(m == lit), np.float32) for m in markers}
    rngs = {m: np.random.default_rng(k) for k, m in enumerate(markers)}
    images = photograph(light, batch, dict.fromkeys(markers, brightness), rngs, 0.25)
    return images[:, MIDDLE, MIDDLE].mean((1, 2), dtype=np.float64)


@pytest.mark.parametrize("batch", ["A", "B"])
def test_a_stain_leaks_into_the_next_channel_alone_and_so_much(batch: str) -> None:
    markers, dark = PANELS[batch], counts(batch, None)
    lit = illumination((SIDE, SIDE))[MIDDLE, MIDDLE].mean()
    noise = 5 * COUNTS_PER_PHOTON * np.sqrt(2 * 600) / (SIDE - 128)  # five standard errors of a mean of shot noise
    for k, marker in enumerate(markers):
        photons = STAINS[marker].photons * BATCH_EFFECTS[batch][0]
        want = np.zeros(len(markers))
        want[k] = COUNTS_PER_PHOTON * photons * lit
        if k + 1 < len(markers):
            want[k + 1] = BLEED_THROUGH * want[k]
        np.testing.assert_allclose(counts(batch, marker) - dark, want, rtol=2e-3, atol=noise / 5)


def test_what_leaks_is_too_weak_to_be_read() -> None:
    assert (
        BLEED_THROUGH <= 0.005
    )  # at 1.5% the stain before can be read, and the truth of the simulation would not hold


def test_a_donor_stains_brighter_in_proportion() -> None:
    dark = counts("A", None)
    once, twice = (counts("A", "LaminB1", b)[1] - dark[1] for b in (1.0, 2.0))
    assert twice / once == pytest.approx(2, rel=5e-3)


def test_the_corners_of_a_field_are_darker() -> None:
    field = illumination((65, 33))
    assert field[32, 16] == 1
    np.testing.assert_allclose(field[[0, 0, -1, -1], [0, -1, 0, -1]], 0.92, rtol=1e-6)
    np.testing.assert_allclose(field, field[::-1, ::-1])
