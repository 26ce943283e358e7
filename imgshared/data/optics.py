"""The simulated microscope: from the light that stains emit to camera counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

FloatArray = NDArray[np.float32]

PANELS = {"A": ("DNA", "LaminB1", "FOXO3", "CD45"), "B": ("DNA", "LaminB1", "gH2AX", "Tubulin")}

HAZE_SIGMA_UM, HAZE_WEIGHT = 4.0, 0.12  # light from above and below the focal plane
# Emission tails run to longer wavelengths, so a channel leaks into the next one only, in the order of the
# panel. DNA (DAPI, the bluest) leaks but receives nothing: the truth "FOXO3 leaves no trace in chromatin" holds.
# It is weak, so that a specific factor is all but invisible in the next stain (at 1.5% one could read it there).
BLEED_THROUGH = 0.005
VIGNETTING = 0.08  # illumination lost in the corners of the field
CAMERA_OFFSET, COUNTS_PER_PHOTON, READ_NOISE_COUNTS = 100.0, 4.0, 6.0


@dataclass(frozen=True)
class Stain:
    """How one marker is seen: ``photons`` where the drawing is 1, ``background`` photons, ``psf_um`` Gaussian sigma."""

    photons: float
    background: float
    psf_um: float


STAINS = {
    "DNA": Stain(260, 6, 0.25),
    "LaminB1": Stain(260, 10, 0.28),
    "FOXO3": Stain(210, 12, 0.31),
    "CD45": Stain(190, 10, 0.34),
    "gH2AX": Stain(190, 10, 0.31),
    "Tubulin": Stain(170, 12, 0.34),
}
# (brightness, background) of a staining batch, relative to the above
BATCH_EFFECTS = {"A": (1.0, 1.0), "B": (0.88, 1.35)}


def photograph(
    light: Mapping[str, FloatArray],
    batch: str,
    brightness: Mapping[str, float],
    rngs: Mapping[str, np.random.Generator],
    pixel_size_um: float,
) -> NDArray[np.uint16]:
    """Photograph one field in the channels of its staining batch.

    Parameters
    ----------
    light
        What each marker emits, (Y, X), about 1 where the stain is typical.
    batch
        ``"A"`` or ``"B"``, which sets the channels, the brightness and the background.
    brightness
        Relative brightness of each marker in this donor.
    rngs
        A random stream for each marker, so that the noise of one channel never depends on another.
    pixel_size_um
        Pixel size in micrometres.

    Returns
    -------
    (C, Y, X) camera counts, channels in the order of ``PANELS[batch]``.
    """
    markers = PANELS[batch]
    batch_brightness, batch_background = BATCH_EFFECTS[batch]
    blurred = []
    for marker in markers:
        stain = STAINS[marker]
        photons = stain.photons * batch_brightness * brightness[marker]
        blurred.append(_blur(light[marker] * np.float32(photons), stain.psf_um, pixel_size_um))
    seen = [blurred[0]] + [own + BLEED_THROUGH * bluer for bluer, own in pairwise(blurred)]
    counts = [
        _expose(image, STAINS[marker].background * batch_background, rngs[marker])
        for marker, image in zip(markers, seen, strict=True)
    ]
    return np.stack(counts)


def illumination(shape: Sequence[int]) -> FloatArray:
    """Relative illumination (Y, X): 1 in the middle of the field, ``1 - VIGNETTING`` in its corners."""
    y, x = _unit_grid(shape)
    return np.asarray(1 - VIGNETTING * (y**2 + x**2) / 2, dtype=np.float32)


def _blur(image: FloatArray, psf_um: float, pixel_size_um: float) -> FloatArray:
    focused = gaussian_filter(image, psf_um / pixel_size_um, mode="constant")
    haze = gaussian_filter(image, HAZE_SIGMA_UM / pixel_size_um, mode="constant", truncate=3)
    return np.asarray((1 - HAZE_WEIGHT) * focused + HAZE_WEIGHT * haze, dtype=np.float32)


def _expose(photons: FloatArray, background: float, rng: np.random.Generator) -> NDArray[np.uint16]:
    y, x = _unit_grid(photons.shape)
    slope_y, slope_x = rng.uniform(-0.25, 0.25, 2)
    expected = (photons + background * (1 + slope_y * y + slope_x * x)) * illumination(photons.shape)
    caught = rng.poisson(expected)
    counts = CAMERA_OFFSET + COUNTS_PER_PHOTON * caught + READ_NOISE_COUNTS * rng.standard_normal(photons.shape)
    return np.asarray(np.clip(np.rint(counts), 0, 65535), dtype=np.uint16)


def _unit_grid(shape: Sequence[int]) -> tuple[FloatArray, FloatArray]:
    """Coordinates (Y, 1) and (1, X) that run from -1 to 1 over the field."""
    y = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, shape[1], dtype=np.float32)[None, :]
    return y, x
