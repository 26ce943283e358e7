"""How far each predicted cell can be trusted: intervals calibrated on groups that the model never learnt from.

`imgshared.evaluation.calibrate` fits it on the validation groups after training; `predict` applies it.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgshared.data.features import central_frame, shape_features, stain_features
from imgshared.prediction.types import Floats, PredictedCells
from imgshared.types import InputError

FILE = "trust.npz"
CLIP = 8.0  # standard deviations: no single feature decides how odd a cell is
ODD = 0.99  # share of calibration cells that are less odd, from which on nothing is predicted for a cell


@dataclass(frozen=True)
class Trust:
    """What the calibration groups say of a run. C markers of its panel, in its order.

    Parameters
    ----------
    level
        Of the intervals.
    groups
        How many groups they were calibrated on.
    radius
        Radius in px of the frame in which the source's features are measured.
    pixel_edges, pixel_half
        (C, B - 1) edges of bins of the driver (the predicted scale where the method has one, else the predicted
        intensity) and (C, B) half widths of a pixel's interval, normalised units; NaN for a marker without calibration.
    cell_edges, cell_half
        The same for the mean intensity in a cell's mask, by its predicted value; raw units.
    levels, pixel_levels, cell_levels
        (L,) other levels, and (L, C, B) half widths that were calibrated to hold them: to see whether the calibration
        holds elsewhere than at `level`.
    limit
        (C,) the mean half width of a cell's pixels from which on the marker's mean picture was as good a guess.
    centre, scale, precision, distances
        (D,), (D,) and (D, D) of the training cells' source features, the latter of standardised ones, and the sorted
        distances of the calibration cells.
    components, mean_latent
        (S, P) principal directions of the shared latent of the source, and its mean (S,); empty without latents.
    """

    level: float
    groups: int
    radius: float
    pixel_edges: Floats
    pixel_half: Floats
    cell_edges: Floats
    cell_half: Floats
    levels: NDArray[np.float64]
    pixel_levels: Floats
    cell_levels: Floats
    limit: Floats
    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    precision: NDArray[np.float64]
    distances: NDArray[np.float64]
    components: NDArray[np.float64]
    mean_latent: NDArray[np.float64]

    def pixels(self, done: PredictedCells, channel: int) -> Floats:
        """Half widths of the pixels' intervals of a marker, (n, Y, X), normalised units."""
        return self.half_widths((done.images["predicted"] if done.scale is None else done.scale)[:, channel], channel)

    def half_widths(self, driver: Floats, channel: int) -> Floats:
        """The same of pixels by their driver: the predicted scale where the method has one, else the mean."""
        return np.asarray(self.pixel_half[channel][np.searchsorted(self.pixel_edges[channel], driver)])

    def cells(self, means: Floats, channel: int) -> Floats:
        """Half widths of the intervals of predicted cell means (n,), raw units."""
        return np.asarray(self.cell_half[channel][np.searchsorted(self.cell_edges[channel], means)])

    def at_levels(self) -> Iterator[tuple[float, Trust]]:
        """Yield (level, the same with intervals of that level), from the lowest to the highest."""
        own = (self.level, self.pixel_half, self.cell_half)
        for level, pixel, cell in sorted(
            [own, *zip(self.levels.tolist(), self.pixel_levels, self.cell_levels, strict=True)], key=lambda x: x[0]
        ):
            yield level, dataclasses.replace(self, level=level, pixel_half=pixel, cell_half=cell)

    def odd(self, described: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of calibration cells that are less odd than each cell, by `describe`'s (n, D): 1 is out of it all."""
        found = distance(described, self.centre, self.scale, self.precision)
        return np.searchsorted(self.distances, found) / len(self.distances)

    def describe(self, done: PredictedCells, source: int) -> NDArray[np.float64]:
        """Return (n, D) of the source (a channel): `describe_source`, and the shared latent where there is one."""
        features = describe_source(done, source, self.radius)
        return np.hstack([features, *describe_latent(done.shared.get("sources"), self.components, self.mean_latent)])

    def abstain(self, widths: Floats, odd: NDArray[np.float64], channel: int) -> NDArray[np.bool_]:
        """Say of which cells a marker is better not predicted, by their pixels' mean half width (n,) and `odd`.

        Without a width, of all: a marker that no calibration cell showed.
        """
        return np.asarray(~(widths < self.limit[channel]) | (odd > ODD))

    def save(self, path: Path) -> None:
        """Write beside, then rename."""
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in dataclasses.fields(self)}
            np.savez(file, **arrays)
        partial.replace(path)


def load_trust(run: Path) -> Trust | None:
    """Read what `Trust.save` wrote into a run folder; None where the run had no group to calibrate on.

    Raises
    ------
    InputError
        For a damaged file.
    """
    path = run / FILE
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found: dict[str, Any] = {name: file[name] for name in file.files}
        scalars = {"level": float(found["level"]), "groups": int(found["groups"]), "radius": float(found["radius"])}
        return Trust(**(found | scalars))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}): remove it, and train --resume makes it again") from error


def describe_source(done: PredictedCells, source: int, radius: float) -> NDArray[np.float64]:
    """Return (n, D): features of the source (a channel) in one frame, shape, and the error of drawing it again."""
    where = central_frame(len(done.cells), done.real.shape[-1], radius)
    blocks = [stain_features(done.real[:, source], where), shape_features(done.masks)]
    if done.source_error is not None:
        blocks.append(np.log(done.source_error + 1e-6)[:, None])
    return np.nan_to_num(np.hstack(blocks).astype(np.float64))


def describe_latent(
    latent: Floats | None, components: NDArray[np.float64], mean: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Coordinates of (n, S) latents along `components` and the logarithm of what these leave over; nothing for none."""
    if latent is None or not components.size:
        return []
    z = latent.astype(np.float64) - mean
    along = z @ components
    rest = np.linalg.norm(z - along @ components.T, axis=1)
    return [along, np.log(rest + 1e-6)[:, None]]


def distance(
    described: NDArray[np.float64],
    centre: NDArray[np.float64],
    scale: NDArray[np.float64],
    precision: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Squared Mahalanobis distance of (n, D) rows, standardised and clipped, from the training cells."""
    z = np.clip((described - centre) / scale, -CLIP, CLIP)
    return np.asarray(np.einsum("nd,de,ne->n", z, precision, z, optimize=True))
