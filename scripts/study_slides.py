"""Real fields and regions through the slide path, held against the field path; and what tiles do to networks that
normalise by the whole image.

    python scripts/study_slides.py DATA OUT [--record benchmarks/slides_real.json]

DATA holds bbbc013/ and imc_spleen/. The wells of bbbc013 become one OME-Zarr plate, which is predicted whole; each
region of imc_spleen is a slide with its mask of cells. For both the greatest difference from `predict_image` is told.
`cut` is asked how much neighbouring pixels differ at the borders of tiles and of its blended windows, and elsewhere.
translator is trained for 1 epoch, a cut of half the width and depth for 2: how well they predict is not the question.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import study_bbbc013
import study_imc_spleen
import zarr
from common import MEAN, ROOT, markdown, record
from numpy.typing import NDArray
from rich.console import Console

import imgshared
from imgshared.config import Experiment, load
from imgshared.data.ngff import Field, open_ngff, plate_fields
from imgshared.data.readers import open_image
from imgshared.data.windows import read_labels
from imgshared.prediction import load_run, predict_image
from imgshared.prediction.run import Run
from imgshared.slides.plate import write_plate_metadata
from imgshared.slides.pyramid import ChannelLook, image_metadata
from imgshared.slides.tiles import OVERLAP, Blended

TILE = 256
SMALL_CUT = ("method.epochs=2", "method.width=16", "method.blocks=3")
COUNTS = ("normalise.transform=arcsinh", "normalise.cofactor=1", "normalise.low=0")


def main() -> None:
    """Run the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks" / "slides_real.json", help="JSON to write")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    data = a.data.resolve()
    wells_store = study_bbbc013.prepared(data / "bbbc013", a.out / "bbbc013")
    regions_store = study_imc_spleen.prepared(data / "imc_spleen", a.out / "imc_spleen", "crop_px=64")
    bbbc013 = trained("translator", wells_store, a.out / "translator_bbbc013", *MEAN, "method.epochs=1")
    spleen = trained("translator", regions_store, a.out / "translator_imc_spleen", *MEAN, "method.epochs=1", *COUNTS)
    plate = plate_of(data / "bbbc013", a.out / "bbbc013.ome.zarr")
    rows = [wells(bbbc013, plate, a.out), *regions(spleen, data / "imc_spleen", a.out)]
    seams = borders(trained("cut", wells_store, a.out / "cut", *SMALL_CUT), plate, a.out)
    record(a.record, {"slides": rows, "seams": seams})
    print(markdown(rows), "\n")
    print(markdown(seams))


def plate_of(data: Path, out: Path) -> Path:
    """Write the wells as an OME-Zarr plate, each of one field."""
    if out.exists():
        return out
    partial, fields = Path(f"{out}.partial"), []
    shutil.rmtree(partial, ignore_errors=True)
    for row in pd.read_csv(data / "wells.csv").itertuples():
        image = open_image(data / str(row.file))
        field = Field(f"{row.row}/{row.column}/0", str(row.row), str(row.column), "0")
        group = zarr.create_group(partial / field.path, zarr_format=3)
        level = group.create_array("0", shape=image.shape, chunks=(1, 256, 256), dtype=image.dtype)
        level[:] = image.read()
        looks = [ChannelLook(name, 0, 255) for name in image.channels]
        group.attrs["ome"] = image_metadata(field.path, looks, image.pixel_size_um, 1, image.dtype)
        fields.append(field)
    write_plate_metadata(partial, out.name, fields)
    partial.rename(out)
    return out


def wells(run: Run, plate: Path, out: Path) -> dict[str, Any]:
    """Predict the plate, and hold every field against its prediction as one image."""
    done = out / "bbbc013.predicted.ome.zarr"
    imgshared.predict(run, plate, done, overwrite=True, console=Console(), dtype="float32", tile=TILE)
    gaps = []
    for field in plate_fields(done):
        image = open_image(plate / field.path)
        whole = predict_image(run, image.read(), image.channels)
        gaps.append((np.abs(open_ngff(done / field.path).read(range(len(whole))) - whole).max(), np.ptp(whole)))
    return row_of("bbbc013, plate", len(gaps), gaps)


def regions(run: Run, data: Path, out: Path) -> list[dict[str, Any]]:
    """Predict every region with its cells, and hold pixels and cells against the whole region's prediction."""
    gaps, cells = [], []
    for path in sorted(data.glob("*.ome.tif")):
        name = path.name.removesuffix(".ome.tif")
        done, mask = out / f"{name}.ome.zarr", data / f"{name}_cells.tif"
        wish = {"dtype": "float32", "tile": TILE, "cells": str(mask), "pixel_size_um": run.contract.pixel_size_um}
        imgshared.predict(run, path, done, overwrite=True, console=Console(), **wish)
        image = open_image(path)
        with read_labels(mask) as read:
            labels = read(*(slice(0, side) for side in image.shape[1:]))
        whole = predict_image(run, image.read(), image.channels)
        gaps.append((np.abs(open_ngff(done).read(range(len(whole))) - whole).max(), np.ptp(whole)))
        table = anndata.read_zarr(out / f"{name}.cells.zarr")
        want = np.stack([means(plane, labels)[table.obs["label"]] for plane in whole], 1)
        cells.append((np.abs(table.X[:, table.var["imputed"].to_numpy()] - want).max(), np.ptp(want)))
    return [row_of("imc_spleen, regions", len(gaps), gaps), row_of("imc_spleen, cells", len(cells), cells)]


def means(plane: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """Mean of each label."""
    area = np.bincount(labels.ravel())
    return np.bincount(labels.ravel(), plane.ravel()) / np.maximum(area, 1)


def row_of(what: str, count: int, gaps: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the greatest difference of some images, and how large that is of their range."""
    return {
        "what": what,
        "images": count,
        "greatest difference": float(max(g for g, _ in gaps)),
        "of the range": float(max(g / r for g, r in gaps)),
    }


def trained(method: str, store: Path, out: Path, *wish: str) -> Run:
    """Train for a moment, once."""
    if not (out / "checkpoints" / "best.safetensors").exists():
        settings = [f"data={store}", "split.test=0.5", "split.val=0.25", *wish]
        imgshared.train(load(Experiment, ROOT / "configs" / f"{method}.yaml", settings), out=out, console=Console())
    return load_run(out)


def borders(run: Run, plate: Path, out: Path) -> list[dict[str, Any]]:
    """Mean difference of neighbouring columns and rows at the borders of tiles and windows, and elsewhere."""
    done = out / "cut.predicted.ome.zarr"
    imgshared.predict(run, plate, done, overwrite=True, console=Console(), dtype="float32", tile=TILE)
    steps = []
    for field in plate_fields(done):
        image = open_ngff(done / field.path).read([0])[0]
        steps += [np.abs(np.diff(image, axis=1)).mean(0), np.abs(np.diff(image, axis=0)).mean(1)]
    step = np.mean(steps, 0)
    side, rng = len(step) + 1, np.random.default_rng(0)
    windows = Blended(lambda pixels: pixels, (side, side)).along(slice(0, side), side)
    ends = {e + k for w in windows for e in (w.start, w.stop) for k in (-OVERLAP, 0, OVERLAP)}
    places = {"tiles": set(range(TILE, side, TILE)), "windows": {e for e in ends if 0 < e < side}}
    every = set().union(*places.values())
    others = np.array([j for j in range(1, side) if j not in every])
    rows = []
    for what, at in places.items():
        chance = [step[rng.choice(others, len(at), replace=False) - 1].mean() for _ in range(2000)]
        span = [float(x) for x in np.percentile(chance, [2.5, 97.5])]
        there, elsewhere = step[[j - 1 for j in sorted(at)]].mean(), step[others - 1].mean()
        rows.append({"borders of": what, "step there": float(there), "elsewhere": float(elsewhere),
                     "95% of as many places": f"{span[0]:.3f} to {span[1]:.3f}"})  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
