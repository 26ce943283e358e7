"""Do the calibrated intervals hold on groups they were not calibrated on, and does dropping unsure cells help?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from imgshared import metrics
from imgshared.evaluation.calibrate import in_raw
from imgshared.prediction import Run
from imgshared.prediction.trust import Trust
from imgshared.prediction.types import PredictedCells

KEPT = tuple(round(1 - k / 10, 1) for k in range(10))  # shares of cells, the surest first


def compare(run: Run, trust: Trust, done: PredictedCells) -> pd.DataFrame:
    """Return a row a (cell, protein) that was measured and calibrated.

    `position` (row in `done`), `marker`, `pixels` (share of them within their intervals), `cell` (whether its mean
    intensity is), `width` (mean half width of its pixels), `error` (mean absolute error of its pixels), `ood`,
    `abstain`, `limit` (the width from which on it does; of the marker); ``pixels at <level>`` and ``cell at <level>``,
    the same as `pixels` and `cell` for intervals of every level that was calibrated.
    """
    chromatin = run.panel.chromatin_index
    odd, raw = trust.odd(trust.describe(done, run.source_channel)), in_raw(run, done)
    tables = []
    for channel, marker in enumerate(run.panel.markers):
        known = np.flatnonzero(done.measured[:, channel] & done.measured[:, chromatin])
        if channel == chromatin or not len(known) or np.isnan(trust.pixel_half[channel]).all():
            continue
        error = np.abs(done.real[known, channel] - done.images["predicted"][known, channel])
        means, width = raw[known, channel], trust.pixels(done, channel)[known].mean((1, 2))
        gap = np.abs(means[:, 0] - means[:, 1])
        columns = {}
        for level, at in trust.at_levels():
            columns[f"pixels at {level:g}"] = (error <= at.pixels(done, channel)[known]).mean((1, 2))
            columns[f"cell at {level:g}"] = gap <= at.cells(means[:, 1], channel)
        columns |= {
            "pixels": columns[f"pixels at {trust.level:g}"], "cell": columns[f"cell at {trust.level:g}"],
            "width": width, "error": error.mean((1, 2)), "ood": odd[known],
            "abstain": trust.abstain(width, odd[known], channel), "limit": trust.limit[channel],
        }  # fmt: skip
        tables.append(pd.DataFrame({"position": known, "marker": marker, **columns}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise `compare`'s rows, joined with a column `group`.

    One row a marker x score with `value`, `low`, `high` over groups, `cells`: ``pixels`` and ``cell``, the share within
    their intervals; ``abstain``, the share of cells that are better not predicted; ``limit``, the mean half width from
    which on that is so (normalised units; the median of a nested study's models; inf: from none).
    """
    rows = []
    for marker, part in table.groupby("marker", sort=False) if len(table) else ():
        for name in ("pixels", "cell", "abstain"):
            statistic = metrics.mean(part["group"], part[name])
            value = metrics.estimate(part["group"], statistic, metrics.SHARE)
            rows.append({"marker": marker, "score": name, **value._asdict(), "cells": len(part)})
        limit = metrics.Estimate(float(part["limit"].median()), np.nan, np.nan)
        rows.append({"marker": marker, "score": "limit", **limit._asdict(), "cells": len(part)})
    return pd.DataFrame(rows)


def reliability(table: pd.DataFrame) -> pd.DataFrame:
    """Hold the share within intervals against their level, by `compare`'s rows joined with a column `group`.

    One row a marker x `what` (``pixels``, ``cell``) x `level` with `value`, `low`, `high` over groups, `cells`.
    """
    rows = []
    for marker, part in table.groupby("marker", sort=False) if len(table) else ():
        for name in (c for c in map(str, part) if " at " in c):
            what, _, level = name.partition(" at ")
            value = metrics.estimate(part["group"], metrics.mean(part["group"], part[name]), metrics.SHARE)
            rows.append({"marker": marker, "what": what, "level": float(level), **value._asdict(), "cells": len(part)})
    return pd.DataFrame(rows)


def risk(table: pd.DataFrame) -> pd.DataFrame:
    """Mean error of the surest cells: one row a marker x `kept` share with `error` and the `cells` kept."""
    rows = []
    for marker, part in table.groupby("marker", sort=False) if len(table) else ():
        surest = part.sort_values("width", kind="stable")["error"].to_numpy()
        for kept in KEPT:
            n = max(1, round(kept * len(surest)))
            rows.append({"marker": marker, "kept": kept, "error": float(surest[:n].mean()), "cells": n})
    return pd.DataFrame(rows)
