"""Per-cell features of one stain: brightness, radial distribution, texture, spots and extent, about the nucleus.

Where "inside" and "outside" are is a frame of coordinates. In a frame of the cell's own outline even a picture that is
the same for every cell tells of the nuclear shape, which is chromatin's information: what a classifier learns from is
measured in one frame for all cells (`central_frame`), and `shape_features` is given to the chromatin input alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import regionprops_table

Floats = NDArray[np.float32]
RINGS = 9
EDGES = (-0.75, -0.5, -0.25, 0.0, 0.15, 0.35, 0.7, 1.4)  # distance from the boundary in nuclear radii, inside negative
SCALES = (0.7, 1.4, 2.8, 5.6)  # px, octaves of the texture bands
SHAPE = ("area", "eccentricity", "axis_major_length", "axis_minor_length", "perimeter", "extent", "solidity")
STAIN_NAMES = (
    *(f"{stat}_{part}" for stat in ("mean", "sd") for part in ("crop", "inside", "outside")),
    *(f"p{q}" for q in (5, 25, 50, 75, 95, 99)),
    "log_ratio",
    "skew_inside",
    "skew_outside",
    *(f"ring{r}" for r in range(RINGS)),
    *(f"ring{r}_relative" for r in range(RINGS)),
    *(f"texture{s}_{part}" for s in SCALES for part in ("inside", "outside")),
    *(f"spot_{what}_{part}" for what in ("count", "height") for part in ("inside", "outside")),
)
EXTENT_NAMES = ("stain_area", "stain_spread", "stain_eccentricity", "stain_offset")


@dataclass(frozen=True)
class Frame:
    """Where each pixel lies: computed once from the masks, used for every stain.

    Parameters
    ----------
    inside
        (n, Y, X) bool, the nucleus.
    ring
        (n, Y, X) intp, 0 (centre) to 8 (far outside), by distance from the nuclear boundary in nuclear radii.
    """

    inside: NDArray[np.bool_]
    ring: NDArray[np.intp]


def frame(masks: NDArray[np.bool_]) -> Frame:
    """Lay the coordinates of (n, Y, X) masks; a cell without any mask pixel counts as all outside."""
    within = np.stack([ndimage.distance_transform_edt(mask) for mask in masks])
    without = np.stack([ndimage.distance_transform_edt(~mask) for mask in masks])
    radius = np.maximum(within.max((1, 2), keepdims=True), 1)
    return Frame(masks, np.digitize((without - within) / radius, EDGES).astype(np.intp))


def central_frame(cells: int, side: int, radius: float) -> Frame:
    """Lay the same coordinates for so many cells, (cells, side, side): a disc of `radius` px in the crop's middle."""
    y, x = np.indices((side, side)) - (side - 1) / 2
    one = frame(np.hypot(y, x)[None] <= radius)
    shape = cells, side, side
    return Frame(np.broadcast_to(one.inside, shape), np.broadcast_to(one.ring, shape))


def typical_radius(masks: NDArray[np.bool_]) -> float:
    """Radius in px of a disc with the median area of (n, Y, X) masks, those without a pixel left out."""
    areas = masks.sum((1, 2))
    return float(np.sqrt(np.median(areas[areas > 0]) / np.pi)) if areas.any() else masks.shape[-1] / 4


def stain_features(images: Floats, where: Frame) -> Floats:
    """Describe one stain: (n, Y, X) normalised intensities to (n, 45) features named `STAIN_NAMES`.

    Means, spreads, percentiles and skewness inside and outside the nucleus; mean by ring, plain and relative to the
    crop; log energy of four difference-of-Gaussian bands; count and height of spots. All finite.
    """
    x = np.nan_to_num(np.asarray(images, np.float32))
    inside, outside = where.inside, ~where.inside
    mean = np.stack([x.mean((1, 2)), _mean(x, inside), _mean(x, outside)])
    crop, nuclear, cytoplasmic = mean
    centred = x - np.where(inside, nuclear[:, None, None], cytoplasmic[:, None, None])
    sd = np.sqrt([x.var((1, 2)), _mean(centred**2, inside), _mean(centred**2, outside)])
    cubes = centred * centred * centred  # numpy's power is ten times slower
    skew = [_mean(cubes, part) / (s + 1e-3) ** 3 for part, s in ((inside, sd[1]), (outside, sd[2]))]
    percentiles = np.percentile(x.reshape(len(x), -1), (5, 25, 50, 75, 95, 99), axis=1)
    ratio = np.log((np.maximum(nuclear, 0) + 0.02) / (np.maximum(cytoplasmic, 0) + 0.02))
    rings = _ring_means(x, where.ring, crop)
    relative = (rings - crop) / (sd[0] + 1e-3)
    return np.vstack([mean, sd, percentiles, ratio, skew, rings, relative, *_texture_and_spots(x, where)]).T.astype(
        np.float32
    )


def extent_features(images: Floats, where: Frame) -> Floats:
    """Describe where a stain lies, whatever its brightness: (n, Y, X) to (n, 4) named `EXTENT_NAMES`. All finite.

    Area above Otsu's threshold (1979) of the image, px; root mean square distance of the light from its centre, px;
    eccentricity of the light's ellipse, 0 (round) to 1; distance of its centre from that of the nucleus, px (0 without
    a nucleus). Light is what lies above the image's 5th percentile.
    """
    x = np.nan_to_num(np.asarray(images, np.float64))
    n, height, width = x.shape
    area = [float((image > threshold_otsu(image)).sum()) if np.ptp(image) > 1e-6 else 0.0 for image in x]
    light = np.maximum(x - np.percentile(x.reshape(n, -1), 5, axis=1)[:, None, None], 0)
    at = np.indices((height, width)).reshape(2, -1)
    middle, spread = _moments(light.reshape(n, -1), at)
    minor, major = np.linalg.eigvalsh(spread).clip(0).T
    eccentricity = np.sqrt(1 - np.divide(minor, major, out=np.ones(n), where=major > 1e-9))
    nucleus, _ = _moments(where.inside.reshape(n, -1).astype(np.float64), at)
    offset = np.where(where.inside.any((1, 2)), np.hypot(*(middle - nucleus).T), 0.0)
    return np.column_stack([area, np.sqrt(minor + major), eccentricity, offset]).astype(np.float32)


def shape_features(masks: NDArray[np.bool_]) -> Floats:
    """Describe the nuclear outline: (n, Y, X) masks to (n, 7) scikit-image region properties named `SHAPE`."""
    n, height, width = masks.shape
    strip = np.zeros((n, height + 1, width), np.int32)  # one tall labelled picture, cells kept apart by a blank row
    strip[:, :height] = masks * np.arange(1, n + 1, dtype=np.int32)[:, None, None]
    table = regionprops_table(strip.reshape(-1, width), properties=("label", *SHAPE))
    return pd.DataFrame(table).set_index("label").reindex(range(1, n + 1), fill_value=0).to_numpy(np.float32)


def blur(images: Floats, sigma: float) -> Floats:
    """Gaussian blur of (..., Y, X) images, edges reflected; as matrix products, so that a wide blur costs no more."""
    rows, columns = (
        ndimage.gaussian_filter1d(np.eye(side, dtype=np.float32), sigma, axis=0, mode="reflect")
        for side in images.shape[-2:]
    )
    return np.asarray(rows @ images @ columns.T, np.float32)


def _texture_and_spots(x: Floats, where: Frame) -> list[Any]:
    levels = [x, *(blur(x, s) for s in SCALES)]
    bands = [fine - coarse for fine, coarse in pairwise(levels)]
    parts = (where.inside, ~where.inside)
    energy = [np.log(np.sqrt(_mean(band**2, part)) + 1e-3) for band in bands for part in parts]
    peaks = bands[1]
    spread = 1.48 * np.median(np.abs(peaks).reshape(len(x), -1), axis=1)[:, None, None]  # robust: spots do not raise it
    spots = (peaks == ndimage.maximum_filter(peaks, (1, 3, 3))) & (peaks > 4 * spread + 0.01)
    counts = [np.sqrt((spots & part).sum((1, 2))) for part in parts]  # the square root evens the spread of counts
    heights = [_mean(peaks, spots & part) for part in parts]
    return [*energy, *counts, *heights]


def _moments(weights: NDArray[np.float64], at: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre (n, 2) and covariance (n, 2, 2) of (n, P) weights at (2, P) positions; the middle, 0 for no weight."""
    total = weights.sum(1, keepdims=True)
    share = np.divide(weights, total, out=np.full_like(weights, 1 / weights.shape[1]), where=total > 1e-12)
    centre = share @ at.T
    second = np.einsum("np,ip,jp->nij", share, at, at, optimize=True) - centre[:, :, None] * centre[:, None, :]
    return centre, np.where(total[:, :, None] > 1e-12, second, 0.0)


def _mean(x: Floats, part: NDArray[np.bool_]) -> Floats:
    """Mean over each image's chosen pixels, 0 where none is."""
    total = np.einsum("nyx,nyx->n", x, part.astype(np.float32))
    return np.asarray(total / np.maximum(part.sum((1, 2)), 1), np.float32)


def _ring_means(x: Floats, ring: NDArray[np.intp], empty: Floats) -> Floats:
    """Mean by ring, (9, n); a ring without pixels (a nucleus too small, a crop too tight) takes the crop's mean."""
    key = (ring + RINGS * np.arange(len(x))[:, None, None]).ravel()
    size = np.bincount(key, minlength=RINGS * len(x)).reshape(len(x), RINGS)
    total = np.bincount(key, x.ravel(), minlength=RINGS * len(x)).reshape(len(x), RINGS)
    return np.where(size > 0, total / np.maximum(size, 1), empty[:, None]).T.astype(np.float32)
