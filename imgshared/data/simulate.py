"""Simulated multiplexed cells with known causes: the one place where shared and specific information is known.

Shared factors shape the chromatin and, with it, every protein; each specific factor shows in one protein only.
``treatment`` acts through shared factors, ``drug`` through ``foxo_switch`` alone. Donors differ in their shared
factors and in how brightly antibodies stain; two staining batches measure different proteins.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tifffile
from numpy.typing import NDArray
from scipy.special import ndtr

from imgshared.data.drawing import BODY_RADIUS_UM, DRAWERS, label_nuclei, nuclear_axes_um, outline_cells, paint
from imgshared.data.optics import PANELS, STAINS, photograph
from imgshared.types import InputError

Scenario = Literal["independent", "entangled"]


@dataclass(frozen=True)
class Factor:
    """A cause that the simulator knows: what it is, and for a specific factor the one marker that shows it."""

    name: str
    kind: Literal["shared", "specific", "condition"]
    marker: str | None = None


FACTORS: tuple[Factor, ...] = (
    Factor("nuclear_area", "shared"),
    Factor("shape_x", "shared"),
    Factor("shape_y", "shared"),
    Factor("heterochromatin", "shared"),
    Factor("cell_type", "shared"),
    Factor("lamin_level", "specific", "LaminB1"),
    Factor("foxo_switch", "specific", "FOXO3"),
    Factor("foci", "specific", "gH2AX"),
    Factor("tubulin_level", "specific", "Tubulin"),
    Factor("cd45_level", "specific", "CD45"),
    Factor("treatment", "condition"),
    Factor("drug", "condition"),
)

# Entangled scenario: the shared factor (and its sign) that each specific factor follows with this correlation.
ENTANGLEMENT = 0.6
ENTANGLED_WITH = {
    "lamin_level": ("nuclear_area", -1),
    "foxo_switch": ("nuclear_area", 1),
    "foci": ("heterochromatin", 1),
    "tubulin_level": ("heterochromatin", -1),
    "cd45_level": ("nuclear_area", 1),
}
TREATMENT_SHIFT = {"nuclear_area": 1.25, "heterochromatin": -1.25}  # the nucleus swells and its chromatin opens
TYPE_SHIFT = {"nuclear_area": 0.6, "heterochromatin": -0.6}  # monocyte minus lymphocyte
SHARED_SD, DONOR_SD, ANTIBODY_SD = 0.85, 0.25, 0.08
SHAPE_SD, SHAPE_MAX = 0.17, 0.5  # log axis ratio along x and along the diagonal; greatest log axis ratio
DRUG_SHIFT = 2.6  # standard deviations of the logit of foxo_switch
FOCI_MAX = 15

CROP_MARGIN_UM = 16.0  # half of a 64-pixel crop at 0.5 um: nuclei further in than this give whole crops
BORDER_SHARE = 0.05  # cells that may lie anywhere in the field; most of those are cut by a crop
FIELD_UM2_PER_CELL = 800.0  # sets how many cells a field holds


@dataclass(frozen=True)
class Field:
    """One image to take: its place in the design of the experiment, and how many cells it shows."""

    index: int
    donor: int
    batch: str
    treatment: str
    drug: str
    replicate: int
    cells: int

    @property
    def image_id(self) -> str:
        """Such as ``D03_A_treated_vehicle_1``."""
        return f"{self.donor_id}_{self.batch}_{self.treatment}_{self.drug}_{self.replicate + 1}"

    @property
    def donor_id(self) -> str:
        """Such as ``D03``."""
        return f"D{self.donor + 1:02d}"


def simulate(
    out: Path,
    *,
    cells: int = 1500,
    donors: int = 8,
    scenario: Scenario = "independent",
    field_px: int = 384,
    pixel_size_um: float = 0.5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Simulate an experiment and write it as a lab would hand it over.

    Writes ``images/*.ome.tif`` (uint16, CYX, channel names and pixel size in the OME metadata), ``masks/*.tif``
    (uint16 nuclear labels), ``manifest.csv`` (a row an image: image, mask, group, batch, treatment, drug, field),
    ``cells.csv`` (a row a cell: image, label, every shared and specific factor, y_px and x_px of the
    nuclear centre) and
    ``factors.json``. The same arguments give the same files.

    Parameters
    ----------
    out
        Folder to make; it must not exist, or be empty.
    cells, donors
        How many of each; every donor is imaged in both staining batches and all four conditions.
    scenario
        ``"independent"``: specific factors know nothing of shared ones. ``"entangled"``: they correlate (r = 0.6).
    field_px, pixel_size_um
        Side of the square images in pixels, and the pixel size in micrometres.
    progress
        Called with (images done, images in all).

    Raises
    ------
    InputError
        When ``out`` holds files already, or an argument is out of range.
    """
    out = Path(out)
    _check(out, cells, donors, scenario, field_px, pixel_size_um, seed)
    partial_out = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    for folder in ("images", "masks"):
        (partial_out / folder).mkdir(parents=True)

    fields = plan_fields(cells, donors, _field_capacity(field_px, pixel_size_um))
    take = partial(
        _write_field, partial_out, scenario=scenario, field_px=field_px, pixel_size_um=pixel_size_um, seed=seed
    )
    tables = []
    pool = ThreadPoolExecutor()
    try:
        for done, table in enumerate(pool.map(take, fields), start=1):
            tables.append(table)
            if progress is not None:
                progress(done, len(fields))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the images still to come

    pd.DataFrame([_manifest_row(field) for field in fields]).to_csv(partial_out / "manifest.csv", index=False)
    pd.concat(tables).to_csv(partial_out / "cells.csv", index=False, float_format="%.6g")
    (partial_out / "factors.json").write_text(json.dumps([asdict(factor) for factor in FACTORS], indent=2) + "\n")
    if out.exists():
        out.rmdir()
    partial_out.rename(out)
    return out


def plan_fields(cells: int, donors: int, capacity: int) -> list[Field]:
    """The design: donors x batches x conditions x as many replicate fields as ``capacity`` (cells a field) asks for."""
    conditions = list(product(range(donors), PANELS, ("control", "treated"), ("vehicle", "drug")))
    replicates = -(-cells // (len(conditions) * capacity))
    designs = [(*condition, replicate) for condition in conditions for replicate in range(replicates)]
    edges = np.arange(len(designs) + 1) * cells // len(designs)  # counts differ by at most one and sum to `cells`
    return [Field(index, *design, cells=int(edges[index + 1] - edges[index])) for index, design in enumerate(designs)]


def draw_factors(field: Field, scenario: Scenario, seed: int) -> pd.DataFrame:
    """Draw the factors of a field's cells (a row each).

    Shared and specific factors come from separate random streams, so that in the independent scenario nothing
    that is drawn for chromatin can know a specific factor. Continuous factors are about standard normal, except
    ``foxo_switch`` (0 cytoplasmic to 1 nuclear), ``foci`` (a count) and the anisotropy vector ``shape_x``,
    ``shape_y`` = log axis ratio times the cosine and sine of twice the angle (from x towards y, y downwards).
    """
    n, rng, donor = field.cells, _stream(seed, field.index, "shared"), _stream(seed, field.donor, "donor")
    monocyte = rng.random(n) < 0.5
    treated = 0.5 if field.treatment == "treated" else -0.5
    table = pd.DataFrame(index=range(n))
    for name in ("nuclear_area", "heterochromatin"):
        mean = (
            DONOR_SD * donor.standard_normal() + TREATMENT_SHIFT[name] * treated + TYPE_SHIFT[name] * (monocyte - 0.5)
        )
        table[name] = np.clip(mean + SHARED_SD * rng.standard_normal(n), -2.8, 2.8)
    shape = SHAPE_SD * rng.standard_normal((2, n))
    table["shape_x"], table["shape_y"] = shape * np.minimum(1, SHAPE_MAX / np.maximum(np.hypot(*shape), 1e-9))
    table["cell_type"] = np.where(monocyte, "monocyte", "lymphocyte")

    specific = _stream(seed, field.index, "specific")
    for factor in FACTORS:
        if factor.kind == "specific":
            normal = specific.standard_normal(n)
            if scenario == "entangled":
                name, sign = ENTANGLED_WITH[factor.name]
                spread = np.sqrt(
                    SHARED_SD**2 + DONOR_SD**2 + (TREATMENT_SHIFT[name] / 2) ** 2 + (TYPE_SHIFT[name] / 2) ** 2
                )
                normal = ENTANGLEMENT * sign * table[name].to_numpy() / spread + np.sqrt(1 - ENTANGLEMENT**2) * normal
            table[factor.name] = _finish_specific(factor.name, np.clip(normal, -2.25, 2.25), field.drug == "drug")
    return table.assign(treatment=field.treatment, drug=field.drug)[[factor.name for factor in FACTORS]]


def draw_field(
    field: Field, factors: pd.DataFrame, *, field_px: int, pixel_size_um: float, seed: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.float32]]:
    """Draw and photograph one field.

    Returns
    -------
    Camera counts (C, Y, X) in the order of the batch's panel, nuclear labels (Y, X), nuclear centres (n, 2) as
    y, x in pixels. Every marker has its own random streams for drawing and noise, and the DNA channel depends on
    the shared factors alone.
    """
    rngs = partial(_stream, seed, field.index)
    typical_um = factors["cell_type"].map(BODY_RADIUS_UM).to_numpy(dtype=float)
    spread = np.exp(0.05 * rngs("body size").standard_normal(len(factors)) + 0.03 * factors["nuclear_area"].to_numpy())
    cells = factors.assign(body_um=np.clip(typical_um * spread, 9, 13))
    centers_um = _place(cells, field_px * pixel_size_um, rngs("place"))
    outlines = outline_cells(cells, centers_um, rngs, field_px, pixel_size_um)
    light = {
        marker: paint(DRAWERS[marker](cells, outlines, rngs(f"draw {marker}")), outlines)
        for marker in PANELS[field.batch]
    }
    noise = {marker: rngs(f"noise {marker}") for marker in light}
    counts = photograph(light, field.batch, _donor_brightness(field.donor, seed), noise, pixel_size_um)
    return counts, label_nuclei(outlines), centers_um / np.float32(pixel_size_um)


def _stream(seed: int, index: int, name: str) -> np.random.Generator:
    """A random stream of its own for each (seed, field or donor, purpose)."""
    return np.random.default_rng([seed, index, *name.encode()])


def _finish_specific(name: str, normal: NDArray[np.float64], drugged: bool) -> NDArray[np.float64]:
    if name == "foxo_switch":
        return np.asarray(1 / (1 + np.exp(-(normal + DRUG_SHIFT * (drugged - 0.5)))))
    if name == "foci":
        return np.minimum(np.floor((FOCI_MAX + 1) * np.asarray(ndtr(normal)) ** 1.2), FOCI_MAX)
    return normal


def _donor_brightness(donor: int, seed: int) -> dict[str, float]:
    """Relative brightness of each marker in a donor; the DNA dye binds more evenly than antibodies do."""
    rng = _stream(seed, donor, "antibodies")
    spread = {marker: 0.02 if marker == "DNA" else ANTIBODY_SD for marker in STAINS}
    return {marker: float(np.exp(sd * rng.standard_normal())) for marker, sd in spread.items()}


def _place(cells: pd.DataFrame, side_um: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Centres (n, 2) in micrometres: bodies may touch and press on each other, nuclei keep apart."""
    nucleus, body = nuclear_axes_um(cells)[0], cells["body_um"].to_numpy()
    centers = np.empty((len(cells), 2), dtype=np.float32)
    for cell in range(len(cells)):
        margin = 6.0 if rng.random() < BORDER_SHARE else CROP_MARGIN_UM + 0.5
        tries = rng.uniform(margin, side_um - margin, (400, 2))
        gap = np.linalg.norm(tries[:, None] - centers[None, :cell], axis=2)
        overlap = (0.86 * (body[cell] + body[:cell]) - gap).max(axis=1, initial=-np.inf)
        clash = (nucleus[cell] + nucleus[:cell] + 1.2 - gap).max(axis=1, initial=-np.inf)
        free = np.flatnonzero(np.maximum(overlap, clash) <= 0)
        centers[cell] = tries[free[0] if len(free) else np.argmin(np.maximum(overlap, 4 * clash))]
    return centers


def _field_capacity(field_px: int, pixel_size_um: float) -> int:
    return int((field_px * pixel_size_um - 2 * CROP_MARGIN_UM) ** 2 / FIELD_UM2_PER_CELL)


def _write_field(
    out: Path, field: Field, *, scenario: Scenario, field_px: int, pixel_size_um: float, seed: int
) -> pd.DataFrame:
    """Draw a field, write its image and mask, and return its rows of ``cells.csv``."""
    factors = draw_factors(field, scenario, seed)
    counts, labels, centers = draw_field(field, factors, field_px=field_px, pixel_size_um=pixel_size_um, seed=seed)
    row = _manifest_row(field)
    metadata = {
        "axes": "CYX",
        "Channel": {"Name": list(PANELS[field.batch])},
        "PhysicalSizeX": pixel_size_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": pixel_size_um,
        "PhysicalSizeYUnit": "µm",
    }
    tifffile.imwrite(
        out / str(row["image"]), counts, ome=True, photometric="minisblack", compression="zlib", metadata=metadata
    )
    tifffile.imwrite(out / str(row["mask"]), labels, photometric="minisblack", compression="zlib")
    factors = factors.drop(columns=["treatment", "drug"])  # they belong to the image: the manifest has them
    where = pd.DataFrame({"image": row["image"], "label": np.arange(1, len(factors) + 1)})
    return pd.concat([where, factors, pd.DataFrame(centers, columns=["y_px", "x_px"])], axis=1)


def _manifest_row(field: Field) -> dict[str, str]:
    return {
        "image": f"images/{field.image_id}.ome.tif",
        "mask": f"masks/{field.image_id}.tif",
        "group": field.donor_id,
        "batch": field.batch,
        "treatment": field.treatment,
        "drug": field.drug,
        "field": field.image_id,
    }


def _check(out: Path, cells: int, donors: int, scenario: str, field_px: int, pixel_size_um: float, seed: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: choose another one, or delete it first")
    if donors < 1 or cells < 8 * donors:
        raise InputError(f"cells={cells}, donors={donors}: each donor needs at least 8 cells, one an image")
    if scenario not in ("independent", "entangled"):
        raise InputError(f"scenario={scenario!r}: choose 'independent' or 'entangled'")
    if not 0.1 <= pixel_size_um <= 1:
        raise InputError(f"pixel_size_um={pixel_size_um}: cells are drawn at 0.1 to 1 micrometre a pixel")
    if _field_capacity(field_px, pixel_size_um) < 1 or field_px * pixel_size_um < 2 * CROP_MARGIN_UM:
        raise InputError(f"field_px={field_px}: a field must be at least {round(62 / pixel_size_um)} pixels wide here")
    if seed < 0:
        raise InputError(f"seed={seed}: must be 0 or more")
