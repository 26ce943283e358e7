"""A table of the cells of a slide: measured and predicted intensities in each label of a mask."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from imgshared.data.ngff import open_ngff
from imgshared.data.place import put_in_place
from imgshared.data.readers import ImageFile, open_mask
from imgshared.data.scan import SIDE, label_sums
from imgshared.data.store import write_anndata
from imgshared.data.windows import plan_tiles, read_labels
from imgshared.prediction.doubts import strange_cells
from imgshared.slides.damage import Damage, covered
from imgshared.slides.job import IMPUTED, Job, usual_trust
from imgshared.slides.judge import judge
from imgshared.slides.source import Slide
from imgshared.types import InputError


def open_labels(slide: Slide, path: Path) -> ImageFile:
    """Open a label mask by its header, and look for a cell in it.

    Raises
    ------
    InputError
        Where it is no label mask, its size is not the slide's (both sizes are named), or it holds no label.
    """
    mask = open_mask(path)
    if mask.shape[1:] != slide.shape:
        theirs, ours = (f"{y} x {x}" for y, x in (mask.shape[1:], slide.shape))
        level = f"level {slide.level} of {slide.path}" + (", resampled," if slide.shape != slide.level_shape else "")
        raise InputError(f"mask {path} is {theirs} pixels, but what is predicted, {level} is {ours}")
    with read_labels(path) as read:
        if not any(read(*tile).any() for tile in plan_tiles(slide.shape, SIDE)):
            raise InputError(f"mask {path} holds no cell: every pixel is 0")
    return mask


def measure_cells(
    job: Job,
    labels: ImageFile,
    image: Path,
    out: Path,
    progress: Callable[[str, int, int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Path:
    """Write an AnnData on Zarr, a row a label: mean raw intensities of the slide's channels and the predicted ones.

    `obs`: label, centroid and area; `var`: whether a column is imputed; ``obsm["spatial"]``: x and y in µm, pixels
    where the size is unknown. A mean is NaN where a part of the cell was not predicted (glass, damage) or, of the
    slide's own channels, could not be read.

    Of a calibrated run, that predicts the mean from its usual sources and with its own normaliser, also
    ``layers["uncertainty"]``: half width of the 90% interval, and ``layers["abstain"]`` and ``obs["ood"]`` as `predict`
    gives them for a store of crops, see `judge`; false and NaN of measured columns. `warn` is told where most cells are
    better not predicted.

    Parameters
    ----------
    labels
        As `open_labels` opened it.
    image
        The predicted image, a folder, whole or all but named; what is unfinished of the table lies in it.
    out
        A folder; what is there is replaced.
    """
    slide, markers = job.slide, job.run.panel.markers
    names = [markers[t] + IMPUTED for t in job.targets]
    found = _sums(job, labels, image, names, partial(progress, "measure cells") if progress else None)
    own, area = len(slide.image.channels), found[["area"]].to_numpy()
    means = (found.filter(like="sum_").to_numpy() / area).astype(np.float32)
    centres = found[["y", "x"]].to_numpy() / area
    obs = pd.DataFrame(
        {
            "label": found.index.to_numpy(),
            "centroid_y_px": centres[:, 0],
            "centroid_x_px": centres[:, 1],
            "area_px": found["area"].to_numpy(np.int64),
        },
        index=[str(label) for label in found.index],
    )
    layers, trust, doubts = dict[str, NDArray[Any]](), usual_trust(job.run, job.config), list[str]()
    if trust is not None:
        whole = np.isfinite(means[:, own:]).all(1)
        told = partial(progress, "judge cells") if progress else None
        odd, unsure = judge(job, trust, labels, obs[whole], image / "crops", told)
        obs["ood"] = np.nan
        obs.loc[whole, "ood"] = odd
        doubts = strange_cells(job.run, odd, unsure, job.targets)
        layers = {"uncertainty": np.full(means.shape, np.nan, np.float32), "abstain": np.zeros(means.shape, bool)}
        layers["abstain"][~whole, own:] = True
        layers["abstain"][np.ix_(whole, np.arange(means.shape[1]) >= own)] = unsure
        for k, channel in enumerate(job.targets, own):
            layers["uncertainty"][whole, k] = trust.cells(means[whole, k], channel)
    table = anndata.AnnData(
        means,
        obs=obs,
        var=pd.DataFrame({"imputed": np.arange(means.shape[1]) >= own}, index=[*slide.image.channels, *names]),
        layers=layers,
        obsm={"spatial": centres[:, ::-1] * (slide.pixel_size_um or 1.0)},
        uns={"imgshared": json.dumps(job.about)},
    )
    write_anndata(table, image / "cells")
    put_in_place(image / "cells", out)
    for text in doubts:
        warn(text)
    return out


def _sums(
    job: Job, labels: ImageFile, image: Path, imputed: list[str], progress: Callable[[int, int], None] | None
) -> pd.DataFrame:
    """Area, sums of coordinates and sums of every channel a label, NaN where a pixel is lost, over the whole slide."""
    predicted, slide = open_ngff(image), job.slide
    places = [predicted.channels.index(name) for name in imputed]
    about: Any = zarr.open_group(image, mode="r").attrs["imgshared"]
    damage = Damage(slide.shape, allowed=job.config.skip_damaged)
    parts, tiles = list[pd.DataFrame](), plan_tiles(slide.shape, SIDE)
    with read_labels(labels.path) as label_of, slide.reader(slide.image.channels) as reader:
        read = damage.guard(reader, len(slide.image.channels), slide.image.dtype)
        for done, tile in enumerate(tiles, 1):
            mask = label_of(*tile)
            if mask.any():
                nothing = covered(about.get("unpredicted", ()), tile)
                if job.tissue is not None:
                    nothing |= ~job.tissue.within(*tile)
                measured = read(*tile)  # before it is known what is lost
                own = _without(covered(damage.blocks, tile), measured)
                theirs = _without(nothing, predicted.read(places, *tile))
                parts.append(label_sums(tile, mask, itertools.chain(own, theirs)))
            if progress:
                progress(done, len(tiles))
    table = pd.concat(parts)
    found, place = np.unique(table.index.to_numpy(), return_inverse=True)  # pandas would add NaN as nothing
    return pd.DataFrame({name: np.bincount(place, table[name].to_numpy()) for name in table}, index=found)


def _without(lost: NDArray[np.bool_], planes: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Yield planes, (y, x), NaN where they are lost."""
    for plane in planes:
        yield np.where(lost, np.nan, plane) if lost.any() else plane
