"""A table of the cells of a slide: measured and predicted intensities in each label of a mask."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from imgshared.data.ngff import open_ngff
from imgshared.data.readers import ImageFile, open_mask
from imgshared.data.scan import SIDE, label_sums
from imgshared.data.store import put_in_place
from imgshared.data.windows import plan_tiles, read_labels
from imgshared.prediction.trust import Trust
from imgshared.slides.source import Slide
from imgshared.types import InputError


def open_labels(slide: Slide, path: Path) -> ImageFile:
    """Open a label mask by its header.

    Raises
    ------
    InputError
        Where it is no label mask, or its size is not the slide's; both sizes are named.
    """
    mask = open_mask(path)
    if mask.shape[1:] != slide.shape:
        theirs, ours = (f"{y} x {x}" for y, x in (mask.shape[1:], slide.shape))
        level = f"level {slide.level} of {slide.path}" + (", resampled," if slide.shape != slide.level_shape else "")
        raise InputError(f"mask {path} is {theirs} pixels, but what is predicted, {level} is {ours}")
    return mask


def measure_cells(
    slide: Slide,
    labels: ImageFile,
    image: Path,
    imputed: Mapping[str, int],
    out: Path,
    trust: Trust | None,
    about: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write an AnnData on Zarr, a row a label: mean raw intensities of the slide's channels and the predicted ones.

    `obs`: label, centroid and area; `var`: whether a column is imputed; ``obsm["spatial"]``: x and y in µm, pixels
    where the size is unknown; ``layers["uncertainty"]``, of a calibrated run: half width of the 90% interval.

    Parameters
    ----------
    labels
        As `open_labels` opened it.
    image, imputed
        The predicted image, and which of its channels to measure: name -> the model's channel.
    out
        A folder; what is there is replaced.

    Raises
    ------
    InputError
        Where the mask holds no label.
    """
    found = _sums(slide, labels, image, list(imputed), progress)
    if found.empty:
        raise InputError(f"mask {labels.path} holds no cell: every pixel is 0")
    names = [*slide.image.channels, *imputed]
    means = (found[[f"sum_{k}" for k in range(len(names))]].to_numpy() / found[["area"]].to_numpy()).astype(np.float32)
    centres = found[["x", "y"]].to_numpy() / found[["area"]].to_numpy()
    table = anndata.AnnData(
        means,
        obs=pd.DataFrame(
            {
                "label": found.index.to_numpy(),
                "centroid_y_px": centres[:, 1],
                "centroid_x_px": centres[:, 0],
                "area_px": found["area"].to_numpy(np.int64),
            },
            index=[str(label) for label in found.index],
        ),
        var=pd.DataFrame({"imputed": [False] * len(slide.image.channels) + [True] * len(imputed)}, index=names),
        obsm={"spatial": centres * (slide.pixel_size_um or 1.0)},
        uns={"imgshared": json.dumps(dict(about))},
    )
    if trust is not None:
        layer = np.full(means.shape, np.nan, np.float32)
        for k, channel in enumerate(imputed.values(), len(slide.image.channels)):
            layer[:, k] = trust.cells(means[:, k], channel)
        table.layers["uncertainty"] = layer
    partial = Path(f"{out}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr announces its future sharding default on every table
        table.write_zarr(partial)
    put_in_place(partial, out)
    return out


def _sums(
    slide: Slide, labels: ImageFile, image: Path, imputed: Sequence[str], progress: Callable[[int, int], None] | None
) -> pd.DataFrame:
    """Area, sums of coordinates and sums of every channel a label, over the whole slide."""
    predicted = open_ngff(image)
    places = [predicted.channels.index(name) for name in imputed]
    parts, tiles = list[pd.DataFrame](), plan_tiles(slide.shape, SIDE)
    with read_labels(labels.path) as label_of, slide.reader(slide.image.channels) as measured:
        for done, tile in enumerate(tiles, 1):
            mask = label_of(*tile)
            if mask.any():
                planes = itertools.chain(measured(*tile), predicted.read(places, *tile))
                parts.append(label_sums(tile, mask, planes))
            if progress:
                progress(done, len(tiles))
    return pd.concat(parts).groupby(level=0).sum() if parts else pd.DataFrame()
