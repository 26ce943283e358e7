"""What the report's pictures show, as tables: which cells, which points, which maps; written as CSV beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared.evaluation.checks import Maps
from imgshared.evaluation.collect import Part

RULES = ((0, "worst"), (10, "10th pct"), (50, "median"), (90, "90th pct"), (100, "best"))  # of the per-cell Pearson
SPECIFIC = 4  # specific latents shown beside the shared one
POINTS = 3000  # dots a map


def pictures(test: Part) -> pd.DataFrame:
    """Choose the cells to show of each stain by their rank in per-cell Pearson r, never by eye.

    Returns
    -------
    One row a marker x rule: `position` in `test`, `cell_id`, `rule`, `pearson` (0 for a constant prediction).
    """
    table = test.fidelity[test.fidelity["prediction"] == "predicted"]
    rows = []
    for marker, part in table.groupby("marker", sort=False):
        ranked = part.assign(pearson=part["pearson"].fillna(0)).sort_values("pearson", kind="stable")
        for percentile, rule in RULES:
            pick = ranked.iloc[round(percentile / 100 * (len(ranked) - 1))]
            at = int(pick["position"])
            rows.append({"marker": marker, "rule": rule, "cell_id": test.obs.index[at], "position": at})
            rows[-1]["pearson"] = float(pick["pearson"])
    return pd.DataFrame(rows)


def contradictions(maps: Mapping[str, Maps]) -> pd.DataFrame:
    """One row a marker and pixel: mean `real` and `predicted`, shares of cells in which it is `missed`, `invented`."""
    tables = []
    for marker, m in maps.items():
        y, x = np.indices(m.real.shape)
        about = {"marker": marker, "y_px": y.ravel(), "x_px": x.ravel()}
        means = {name: (getattr(m, name) / m.cells).ravel() for name in ("real", "predicted", "missed", "invented")}
        tables.append(pd.DataFrame({**about, **means}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def latent_points(test: Part, chromatin: str) -> pd.DataFrame:
    """First two principal components of the shared latent of chromatin and of some specific ones, of some cells.

    One row a latent and cell: `latent`, `position` in `test`, `cell_id`, `pc1`, `pc2`.
    """
    shared = f"z_s [{chromatin}]"
    names = [shared] * (shared in test.latents) + [n for n in test.latents if n.startswith("z_m")][:SPECIFIC]
    some = np.sort(np.random.default_rng(0).permutation(len(test.obs))[:POINTS])
    tables = []
    for name in names:
        at = some[np.isfinite(test.latents[name][some]).all(1)]
        if len(at) > 2:
            points = _principal(test.latents[name][at].astype(np.float64))
            about = {"latent": name, "position": at, "cell_id": test.obs.index[at]}
            tables.append(pd.DataFrame({**about, "pc1": points[:, 0], "pc2": points[:, 1]}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _principal(x: NDArray[np.float64]) -> NDArray[Any]:
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    left, strength, _ = np.linalg.svd(x, full_matrices=False)
    points = (left * strength)[:, :2]
    return points if points.shape[1] == 2 else np.column_stack([points[:, 0], np.zeros(len(x))])
