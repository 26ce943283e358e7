"""Drawing simulated cells: their outlines from the shared factors, then what each marker emits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

FloatArray = NDArray[np.float32]

PATCH_UM = 36.0  # each cell is drawn in a square patch of this side
LEVEL_EFFECT = 0.42  # brightness per unit of lamin_level, tubulin_level and cd45_level, which lie within +-2.25
NUCLEAR_DIAMETER_UM = 11.2  # at nuclear_area = 0
BODY_RADIUS_UM = {"lymphocyte": 9.8, "monocyte": 11.4}


@dataclass(frozen=True)
class Outlines:
    """Where n cells lie in a field and how they are shaped; patches are (n, P, P), lengths in pixels.

    Parameters
    ----------
    corners
        (n, 2) integer y, x of each patch's first pixel in the field; may lie outside it.
    dy, dx
        Offset of each pixel from the nuclear centre.
    nucleus, body
        Signed distance to the outline, negative inside. Bodies that meet share a straight border.
    depth
        Distance from the nuclear centre relative to the outline's: 0 in the centre, 1 on the outline.
    """

    corners: NDArray[np.int64]
    dy: FloatArray
    dx: FloatArray
    nucleus: FloatArray
    body: FloatArray
    depth: FloatArray
    nucleoli: FloatArray
    field_px: int
    pixel_size_um: float


def nuclear_axes_um(cells: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    """Half axes (long, short) of each nucleus in micrometres, from ``nuclear_area`` and the anisotropy vector."""
    radius = NUCLEAR_DIAMETER_UM / 2 * np.exp(0.085 * _column(cells, "nuclear_area"))
    stretch = np.exp(np.hypot(_column(cells, "shape_x"), _column(cells, "shape_y")) / 2)
    return radius * stretch, radius / stretch


def outline_cells(
    cells: pd.DataFrame,
    centers_um: FloatArray,
    rngs: Callable[[str], np.random.Generator],
    field_px: int,
    pixel_size_um: float,
) -> Outlines:
    """Outline nuclei, nucleoli and cell bodies from the shared factors alone.

    Parameters
    ----------
    cells
        n rows with ``nuclear_area``, ``shape_x``, ``shape_y``, ``cell_type`` and ``body_um`` (body radius).
    centers_um
        (n, 2) y, x of the nuclear centres in micrometres from the field's corner.
    rngs
        Gives the random stream of a name; outlines use ``"nucleus"``, ``"nucleoli"`` and ``"body"``.
    """
    n, size = len(cells), 2 * round(PATCH_UM / pixel_size_um / 2)
    centers = centers_um / pixel_size_um
    corners = np.rint(centers).astype(np.int64) - size // 2
    axis = np.arange(size, dtype=np.float32)
    dy = np.broadcast_to((axis - (centers - corners)[:, :1])[:, :, None], (n, size, size)).astype(np.float32)
    dx = np.broadcast_to((axis - (centers - corners)[:, 1:])[:, None, :], (n, size, size)).astype(np.float32)

    long_um, short_um = nuclear_axes_um(cells)
    angle = _float(np.arctan2(_column(cells, "shape_y"), _column(cells, "shape_x")) / 2)
    nucleus, depth = _outline(dy, dx, long_um / pixel_size_um, short_um / pixel_size_um, angle, rngs("nucleus"), 0.022)

    rng = rngs("body")
    shift = rng.normal(0, 0.7 / pixel_size_um, (2, n, 1, 1)).astype(np.float32)
    stretch = (long_um / short_um) ** 0.25  # the body follows the nucleus half way
    radius = _column(cells, "body_um") / pixel_size_um
    body, _ = _outline(dy - shift[0], dx - shift[1], radius * stretch, radius / stretch, angle, rng, 0.045)
    body = np.minimum(body, nucleus - 1.5 / pixel_size_um)  # the nucleus never leaves its cell
    body = _settle_borders(body, corners, field_px)
    nucleoli = _draw_nucleoli(cells, dy, dx, short_um / pixel_size_um, pixel_size_um, rngs("nucleoli"))
    return Outlines(corners, dy, dx, nucleus, body, depth, nucleoli, field_px, pixel_size_um)


def label_nuclei(outlines: Outlines) -> NDArray[np.uint16]:
    """Label mask (Y, X) of the nuclei: 0 outside, 1 to n in the order of the cells."""
    pad, size = outlines.nucleus.shape[1], outlines.nucleus.shape[1]
    canvas = np.zeros((outlines.field_px + 2 * pad,) * 2, dtype=np.uint16)
    for label, ((y, x), distance) in enumerate(zip(outlines.corners + pad, outlines.nucleus, strict=True), start=1):
        canvas[y : y + size, x : x + size][distance < 0] = label
    return canvas[pad:-pad, pad:-pad]


def paint(patches: FloatArray, outlines: Outlines) -> FloatArray:
    """Add each cell's patch (n, P, P) into one field (Y, X)."""
    pad, size = patches.shape[1], patches.shape[1]
    canvas = np.zeros((outlines.field_px + 2 * pad,) * 2, dtype=np.float32)
    for (y, x), patch in zip(outlines.corners + pad, patches, strict=True):
        canvas[y : y + size, x : x + size] += patch
    return canvas[pad:-pad, pad:-pad]


def draw_dna(cells: pd.DataFrame, outlines: Outlines, rng: np.random.Generator) -> FloatArray:
    """Chromatin: fine texture, bright chromocentres and a bright rim that grow with ``heterochromatin``, dark nucleoli.

    Sees the shared factors only. Larger nuclei are dimmer, because the amount of DNA is the same.
    """
    px = outlines.pixel_size_um
    heterochromatin = _column(cells, "heterochromatin")
    coarse_um = np.where(cells["cell_type"] == "lymphocyte", 0.95, 0.6)
    noise = rng.standard_normal((2, *outlines.nucleus.shape), dtype=np.float32)
    fine = _smooth_noise(noise[0], np.full(len(cells), 0.4), px)
    clumps = _sigmoid((_standardise(_smooth_noise(noise[1], coarse_um, px), _nuclear(outlines)) - 0.75) / 0.3)
    near_rim = np.exp(-(((outlines.nucleus * px + 0.6) / 0.6) ** 2))
    euchromatin = 1 + 0.09 * fine
    dense = _each(np.maximum(0.66 + 0.26 * heterochromatin, 0.02)) * clumps
    rim = _each(np.maximum(0.46 + 0.20 * heterochromatin, 0.02)) * near_rim
    thickness = np.sqrt(np.maximum(1 - 0.75 * outlines.depth**2, 0.1))
    amount = np.exp(0.04 * rng.standard_normal(len(cells)) - 0.11 * _column(cells, "nuclear_area"))
    amount *= np.exp(0.05 * heterochromatin)  # AT-rich heterochromatin binds DAPI more brightly
    open_space = 1 - 0.75 * outlines.nucleoli
    return _float(0.6 * _each(amount) * _nuclear(outlines) * thickness * open_space * (euchromatin + dense + rim))


def draw_lamin(cells: pd.DataFrame, outlines: Outlines, rng: np.random.Generator) -> FloatArray:
    """LaminB1: a rim on the nuclear outline, linear in ``lamin_level``; nucleoplasmic haze with heterochromatin."""
    px = outlines.pixel_size_um
    noise = rng.standard_normal(outlines.nucleus.shape, dtype=np.float32)
    patchy = 1 + 0.14 * _smooth_noise(noise, np.full(len(cells), 0.9), px)
    rim = np.exp(-0.5 * ((outlines.nucleus * px + 0.25) / 0.38) ** 2)
    level = 1 + LEVEL_EFFECT * _column(cells, "lamin_level")
    face = 0.13 * _each(level) * (0.6 + 0.4 * outlines.depth**2)  # the lamina above and below the focal plane
    haze = 0.14 + 0.035 * _each(_column(cells, "heterochromatin"))
    inside = _nuclear(outlines) * (face + np.maximum(haze, 0.02) * (1 - 0.5 * outlines.nucleoli))
    return _float(patchy * (_each(level) * rim + inside))


def draw_foxo(cells: pd.DataFrame, outlines: Outlines, rng: np.random.Generator) -> FloatArray:
    """FOXO3: ``foxo_switch`` (0 to 1) moves it from the cytoplasm into the nucleus; the sum varies a little."""
    noise = rng.standard_normal(outlines.nucleus.shape, dtype=np.float32)
    grain = 1 + 0.13 * _smooth_noise(noise, np.full(len(cells), 0.55), outlines.pixel_size_um)
    switch = _each(_column(cells, "foxo_switch"))
    total = _each(np.exp(0.1 * rng.standard_normal(len(cells))))
    nucleus, thickness = _nuclear(outlines), _body_thickness(outlines)
    nuclear = (0.14 + 0.95 * switch) * nucleus * (1 - 0.45 * outlines.nucleoli)
    cytoplasmic = (0.85 - 0.66 * switch) * thickness * (1 - 0.75 * nucleus)
    return _float(total * grain * (nuclear + cytoplasmic))


def draw_cd45(cells: pd.DataFrame, outlines: Outlines, rng: np.random.Generator) -> FloatArray:
    """CD45: a patchy membrane ring, linear in ``cd45_level``, brighter on lymphocytes; a faint even surface."""
    px = outlines.pixel_size_um
    noise = rng.standard_normal(outlines.body.shape, dtype=np.float32)
    patchy = np.maximum(1 + 0.28 * _smooth_noise(noise, np.full(len(cells), 0.8), px), 0.1)
    ring = np.exp(-0.5 * ((outlines.body * px + 0.35) / 0.42) ** 2)
    by_type = np.where(cells["cell_type"] == "lymphocyte", 1.08, 0.92)
    level = (1 + LEVEL_EFFECT * _column(cells, "cd45_level")) * by_type
    return _float(_each(level) * patchy * (ring + 0.2 * _inside(outlines.body)))


def draw_foci(cells: pd.DataFrame, outlines: Outlines, rng: np.random.Generator) -> FloatArray:
    """gH2AX: ``foci`` bright spots; a faint nucleoplasm that grows with heterochromatin and a little with the foci."""
    px = outlines.pixel_size_um
    noise = rng.standard_normal(outlines.nucleus.shape, dtype=np.float32)
    grain = 1 + 0.2 * _smooth_noise(noise, np.full(len(cells), 0.5), px)
    diffuse = 0.15 + 0.04 * _each(_column(cells, "heterochromatin")) + 0.012 * _each(_column(cells, "foci"))
    image = np.maximum(diffuse, 0.02) * grain * _nuclear(outlines) * (1 - 0.5 * outlines.nucleoli)
    for cell, count in enumerate(_column(cells, "foci").astype(int)):
        allowed = np.flatnonzero((outlines.depth[cell] < 0.85) & (outlines.nucleoli[cell] < 0.4))
        y, x = np.divmod(rng.choice(allowed, count), image.shape[2])
        sigma = rng.uniform(0.44, 0.54, count) / px
        peak = rng.normal(1, 0.12, count) * (0.49 / px / sigma) ** 2  # the light of a focus, not its peak, is steady
        rows = np.exp(-0.5 * ((np.arange(image.shape[1])[None] - y[:, None]) / sigma[:, None]) ** 2)
        columns = np.exp(-0.5 * ((np.arange(image.shape[2])[None] - x[:, None]) / sigma[:, None]) ** 2)
        image[cell] += np.einsum("fy,fx->yx", rows * peak[:, None], columns)
    return _float(image)


def draw_tubulin(cells: pd.DataFrame, outlines: Outlines, rng: np.random.Generator) -> FloatArray:
    """Tubulin: fibres that radiate from a centrosome beside the nucleus, linear in ``tubulin_level``."""
    n, px = len(cells), outlines.pixel_size_um
    long_um, _ = nuclear_axes_um(cells)
    direction = rng.uniform(0, 2 * np.pi, n)
    dy = outlines.dy * px - _each(0.95 * long_um * np.sin(direction))
    dx = outlines.dx * px - _each(0.95 * long_um * np.cos(direction))
    distance = np.hypot(dy, dx)
    fibres = np.clip(1 + 0.45 * _radial_noise(dy, dx, distance, rng), 0.1, 3)
    grain = 1 + 0.16 * _smooth_noise(rng.standard_normal(dy.shape, dtype=np.float32), np.full(n, 0.4), px)
    aster = 0.5 + 0.9 * np.exp(-distance / 5)
    level = 1 + LEVEL_EFFECT * _column(cells, "tubulin_level")
    density = np.maximum(1 - 0.06 * _column(cells, "heterochromatin"), 0.3)
    cytoplasm = _body_thickness(outlines) * (1 - 0.72 * _nuclear(outlines))
    layout = fibres * grain * aster
    layout *= cytoplasm.sum(axis=(1, 2), keepdims=True) / (cytoplasm * layout).sum(axis=(1, 2), keepdims=True)
    return _float(0.75 * _each(level * density) * cytoplasm * layout)


DRAWERS: Mapping[str, Callable[[pd.DataFrame, Outlines, np.random.Generator], FloatArray]] = {
    "DNA": draw_dna,
    "LaminB1": draw_lamin,
    "FOXO3": draw_foxo,
    "CD45": draw_cd45,
    "gH2AX": draw_foci,
    "Tubulin": draw_tubulin,
}


def _outline(
    dy: FloatArray,
    dx: FloatArray,
    long: FloatArray,
    short: FloatArray,
    angle: FloatArray,
    rng: np.random.Generator,
    ruggedness: float,
) -> tuple[FloatArray, FloatArray]:
    """Signed distance and relative radius of ellipses whose outline is ruffled by Fourier orders 3 to 5."""
    cos, sin = _each(np.cos(angle)), _each(np.sin(angle))
    along, across = (dx * cos + dy * sin) / _each(long), (dy * cos - dx * sin) / _each(short)
    turn = np.arctan2(across, along)
    ruffle = np.ones_like(turn)
    for order in (3, 4, 5):
        amplitude = ruggedness * rng.standard_normal(len(long)) * (3 / order)
        ruffle += _each(amplitude) * np.cos(order * turn + _each(rng.uniform(0, 2 * np.pi, len(long))))
    relative = np.hypot(along, across)
    depth = relative / ruffle
    # Divided by the gradient of the ellipse, (depth - 1) becomes a distance that is right near the outline.
    slope = np.hypot(along / _each(long), across / _each(short)) / np.maximum(relative, 1e-3) / ruffle
    return _float((depth - 1) / np.maximum(slope, 1e-6)), _float(depth)


def _settle_borders(body: FloatArray, corners: NDArray[np.int64], field_px: int) -> FloatArray:
    """Where bodies overlap, give each pixel to the cell that it lies deeper in."""
    pad, size = body.shape[1], body.shape[1]
    deepest = np.full((field_px + 2 * pad,) * 2, np.inf, dtype=np.float32)
    second = deepest.copy()
    windows = [(slice(y, y + size), slice(x, x + size)) for y, x in corners + pad]
    for window, distance in zip(windows, body, strict=True):
        second[window] = np.minimum(second[window], np.maximum(deepest[window], distance))
        deepest[window] = np.minimum(deepest[window], distance)
    settled = np.empty_like(body)
    for cell, window in enumerate(windows):
        others = np.where(body[cell] <= deepest[window], second[window], deepest[window])
        settled[cell] = np.maximum(body[cell], (body[cell] - others) / 2)
    return settled


def _draw_nucleoli(
    cells: pd.DataFrame,
    dy: FloatArray,
    dx: FloatArray,
    short: FloatArray,
    pixel_size_um: float,
    rng: np.random.Generator,
) -> FloatArray:
    """Nucleoli (n, P, P) from 0 to 1: two or three small ones in lymphocytes, a large one in monocytes."""
    lymphocyte = np.asarray(cells["cell_type"] == "lymphocyte")
    nucleoli = np.zeros_like(dy)
    for rank in range(3):
        present = np.where(lymphocyte, (rank < 2) | (rng.random(len(cells)) < 0.4), rank == 0)
        radius = np.where(lymphocyte, rng.uniform(0.5, 0.75, len(cells)), rng.uniform(1.45, 1.85, len(cells)))
        farthest = np.where(lymphocyte, 0.6, 0.35) * short
        reach, turn = farthest * np.sqrt(rng.random(len(cells))), rng.uniform(0, 2 * np.pi, len(cells))
        squared = (dy - _each(reach * np.sin(turn))) ** 2 + (dx - _each(reach * np.cos(turn))) ** 2
        hole = _each(present) * np.exp(-((squared / _each((radius / pixel_size_um) ** 2)) ** 2))
        nucleoli = np.maximum(nucleoli, hole)
    return _float(nucleoli)


def _smooth_noise(noise: FloatArray, sigma_um: NDArray[np.float64], pixel_size_um: float) -> FloatArray:
    """White noise (n, P, P) made smooth at each cell's own scale, with standard deviation 1."""
    smooth = np.empty_like(noise)
    for sigma in np.unique(sigma_um):
        chosen = sigma_um == sigma
        pixels = sigma / pixel_size_um
        smooth[chosen] = gaussian_filter(noise[chosen], (0, pixels, pixels), mode="wrap", truncate=3)
    return _standardise(smooth, np.ones_like(smooth))


def _standardise(noise: FloatArray, weight: FloatArray) -> FloatArray:
    """Shift and scale each patch (n, P, P) to mean 0 and standard deviation 1 where ``weight`` is 1."""
    total = weight.sum(axis=(1, 2), keepdims=True)
    centred = noise - (noise * weight).sum(axis=(1, 2), keepdims=True) / total
    variance = (centred**2 * weight).sum(axis=(1, 2), keepdims=True) / total
    return _float(centred / np.sqrt(np.maximum(variance, 1e-12)))


def _radial_noise(dy: FloatArray, dx: FloatArray, distance: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Noise (n, P, P) that is drawn out along the rays from the origin of ``dy``, ``dx`` (micrometres)."""
    n, rays, steps = len(dy), 80, 24
    noise = gaussian_filter(rng.standard_normal((n, rays, steps), dtype=np.float32), (0, 0.7, 2.5), mode="wrap")
    noise /= noise.std(axis=(1, 2), keepdims=True)
    bend = 0.03 * distance * _each(rng.normal(0, 1, n))
    ray = ((np.arctan2(dy, dx) + bend) / (2 * np.pi)) % 1 * rays
    lower = np.floor(ray).astype(np.intp)
    weight = ray - lower
    step = np.minimum(distance, steps - 1).astype(np.intp)
    cell = np.arange(n)[:, None, None]
    return _float((1 - weight) * noise[cell, lower % rays, step] + weight * noise[cell, (lower + 1) % rays, step])


def _nuclear(outlines: Outlines) -> FloatArray:
    return _inside(outlines.nucleus)


def _body_thickness(outlines: Outlines) -> FloatArray:
    """Thickness of the cell, thin at its edge and 1 in the middle."""
    depth_um = np.maximum(-outlines.body, 0) * outlines.pixel_size_um
    return _float(_inside(outlines.body) * (0.18 + 0.82 * (1 - np.exp(-depth_um / 2.2))))


def _inside(distance: FloatArray) -> FloatArray:
    """1 inside, 0 outside, soft over a pixel so that outlines are not jagged."""
    return _sigmoid(-distance / 0.4)


def _sigmoid(x: FloatArray) -> FloatArray:
    return _float(0.5 * (1 + np.tanh(x / 2)))


def _each(values: NDArray[np.generic]) -> FloatArray:
    """One value a cell (n,), ready to meet patches (n, P, P)."""
    return values.astype(np.float32)[:, None, None]


def _column(cells: pd.DataFrame, name: str) -> FloatArray:
    return cells[name].to_numpy(dtype=np.float32)


def _float(array: NDArray[np.floating]) -> FloatArray:
    return np.asarray(array, dtype=np.float32)
