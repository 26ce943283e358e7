"""Nuclei on the chromatin channel, for images that come without a label mask."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_li, threshold_otsu
from skimage.segmentation import watershed

from imgshared.types import InputError

_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*(um|µm|μm|px)")  # both code points of the micro sign


@dataclass(frozen=True)
class SegmentSettings:
    """How nuclei are found. Lengths are "6 um" or "12 px", pixels being those of the stored crops.

    Parameters
    ----------
    smooth
        Standard deviation of the Gaussian before the threshold.
    background
        Half width of the window whose darkest part is taken for background; larger than a nucleus.
    threshold
        `otsu` and `li` set one threshold an image, `local` one a neighbourhood (uneven staining).
    threshold_scale
        Multiplies the threshold: below 1 finds dimmer nuclei.
    min_diameter, max_diameter
        Range of the diameter of the circle that has the nucleus's area.
    split
        Least distance between the centres of two nuclei.
    """

    smooth: str = "1 px"
    background: str = "60 px"
    threshold: Literal["otsu", "local", "li"] = "otsu"
    threshold_scale: float = 1.0
    min_diameter: str = "10 px"
    max_diameter: str = "80 px"
    split: str = "10 px"


def length_px(text: str, pixel_size_um: float | None) -> float:
    """Return a length such as "6 um" or "12 px" in pixels.

    Raises
    ------
    InputError
        Where the text is no length, or is in micrometres and the pixel size is unknown.
    """
    match = _LENGTH.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a length: write for example '6 um' or '12 px'")
    value, unit = float(match[1]), match[2]
    if unit == "px":
        return value
    if pixel_size_um is None:
        raise InputError(f"{text!r}: the images do not give their pixel size: set source_pixel_size_um, or write px")
    return value / pixel_size_um


def segment_nuclei(
    chromatin: NDArray[Any], settings: SegmentSettings, pixel_size_um: float | None = None
) -> NDArray[np.int32]:
    """Segment nuclei: smooth, subtract the background, threshold, split touching ones by watershed.

    Parameters
    ----------
    chromatin
        (Y, X), any real dtype.
    pixel_size_um
        Micrometres a pixel; needed where a setting is in micrometres.

    Returns
    -------
    (Y, X) labels, 0 where there is no nucleus.
    """
    smooth, background, smallest, largest, split = (
        length_px(text, pixel_size_um)
        for text in (settings.smooth, settings.background, settings.min_diameter, settings.max_diameter, settings.split)
    )
    image = ndimage.gaussian_filter(chromatin.astype(np.float32), smooth)
    image = subtract_background(image, background)
    foreground = image > _threshold(image, settings, background)
    foreground = ndimage.binary_opening(ndimage.binary_fill_holes(foreground), iterations=1)
    labels = _split(foreground, image, split)
    areas = np.bincount(labels.ravel())
    diameters = np.sqrt(4 / math.pi * areas)
    keep = (diameters >= smallest) & (diameters <= largest)
    keep[0] = False
    renumber = np.zeros(len(keep), np.int32)
    renumber[keep] = np.arange(1, keep.sum() + 1)
    return np.asarray(renumber[labels])


def subtract_background(image: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    """Subtract the smoothed grey opening of a square window: a rolling ball's result at a fraction of its time."""
    size = 2 * round(radius) + 1
    floor = ndimage.maximum_filter(ndimage.minimum_filter(image, size), size)
    floor = ndimage.gaussian_filter(floor, radius / 2)
    return np.asarray(np.maximum(image - floor, 0))


def _threshold(image: NDArray[np.float32], settings: SegmentSettings, radius: float) -> Any:
    """Return one threshold, or with `local` one a pixel."""
    clipped = np.minimum(image, np.percentile(image, 99.5))  # debris and mitoses would pull Otsu up
    if clipped.min() == clipped.max():
        return np.inf
    if settings.threshold == "li":
        return settings.threshold_scale * threshold_li(clipped)
    level = threshold_otsu(clipped)
    if settings.threshold == "otsu":
        return settings.threshold_scale * level
    nearby = ndimage.gaussian_filter(clipped, radius / 2)
    return settings.threshold_scale * np.maximum(nearby, level / 2)  # half of Otsu keeps empty regions empty


def _split(foreground: NDArray[np.bool_], image: NDArray[np.float32], distance_px: float) -> NDArray[np.int32]:
    """Watershed from the peaks of the distance to the edge times the square root of intensity.

    The distance alone cuts lobed nuclei, intensity alone cuts textured ones. Far from any edge, in dense tissue, the
    distance tells nothing of single nuclei: it is capped there.
    """
    distance = np.minimum(ndimage.distance_transform_edt(foreground), distance_px)
    bright = np.sqrt(ndimage.gaussian_filter(image, max(1.0, distance_px / 6)))
    height = ndimage.gaussian_filter(distance * bright, max(1.0, distance_px / 8))
    parts, _ = ndimage.label(foreground)
    peaks = peak_local_max(height, min_distance=max(1, round(distance_px / 2)), labels=parts, exclude_border=False)
    markers = np.zeros(foreground.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return np.asarray(watershed(-height, markers, mask=foreground), np.int32)
