"""What was found of each judged cell: a tidy table, and the same as an AnnData."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from imgshared.config import EvaluateConfig
from imgshared.data.panel import Panel
from imgshared.data.store import write_anndata
from imgshared.evaluation import checks
from imgshared.evaluation.collect import Part

FIDELITY = ("l1", "pearson", "ssim", "detail", "intensity_real", "intensity_predicted")
TRUST = ("width", "ood", "abstain")


def table(test: Part, config: EvaluateConfig) -> pd.DataFrame:
    """Return a row a cell and measured protein: cell_id, image, group, labels, factors, marker, and every score."""
    scores = test.fidelity[test.fidelity["prediction"] == "predicted"]
    wanted = dict.fromkeys(("image", config.group, "group", *config.labels, *config.factors))
    about = test.obs[[c for c in wanted if c in test.obs]].iloc[scores["position"].to_numpy(int)]
    about = about.rename_axis("cell_id").reset_index()
    rows = pd.concat([about, scores[["marker", *FIDELITY]].reset_index(drop=True)], axis=1)
    for more, columns in ((test.checks, checks.COLUMNS), (test.trust, TRUST)):
        if len(more):
            found = more.assign(cell_id=test.obs.index[more["position"].to_numpy(int)])
            rows = rows.merge(found[["cell_id", "marker", *columns]], on=["cell_id", "marker"], how="left")
    return rows


def write(test: Part, rows: pd.DataFrame, panel: Panel, path: Path) -> None:
    """Write the judged cells as AnnData on Zarr, in place of what an interrupted evaluation left there.

    `obs` is the store's; `var` are the judged proteins; a layer a score of `table`, (N, M), NaN where a protein was not
    measured; `X` is the predicted mean intensity, normalised; `obsm` the latents, e.g. ``z_s [DNA]``, NaN where not
    measured; a slash in a marker's name is an underscore there.
    """
    markers = [m for m in panel.proteins if m in set(rows["marker"])]
    names = [c for c in (*FIDELITY, *checks.COLUMNS, *TRUST) if c in rows]
    layers = {name: np.full((len(test.obs), len(markers)), np.nan, np.float32) for name in names}
    at = test.obs.index.get_indexer(pd.Index(rows["cell_id"])), pd.Index(markers).get_indexer(pd.Index(rows["marker"]))
    for name, values in layers.items():
        values[at] = rows[name].astype(float)
    found = anndata.AnnData(
        layers["intensity_predicted"],
        obs=test.obs.copy(),
        var=pd.DataFrame(index=pd.Index(markers, name="marker")),
        layers=layers,
        obsm={name.replace("/", "_"): values for name, values in test.latents.items()},
    )
    shutil.rmtree(path, ignore_errors=True)
    write_anndata(found, path)
