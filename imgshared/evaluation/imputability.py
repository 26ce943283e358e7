"""Imputability: how much of a stain's variation a model recovers on groups it never learnt from, and why not more.

Computed on the validation groups as soon as a model is trained, before anyone looks at a picture; `predict` warns with
it. An evaluation gives it again for the held-out groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from imgshared import metrics
from imgshared.data.store import CellStore
from imgshared.evaluation.fidelity import compare
from imgshared.evaluation.floors import Floors
from imgshared.evaluation.judgeable import Rows, Shown, sampled, seen, unpaired
from imgshared.prediction import Run, predict_batches
from imgshared.prediction.cells import Progress
from imgshared.types import InputError

FILE = "imputability.json"
CELLS = 1000  # of training and of validation that are looked at, at most
REBUILT = 500  # of the latter, about, whose stains are drawn again from themselves, which costs the most
BLOCK = 64
LOW = 0.2  # share below which a prediction is warned of
GAP = 0.2  # of R2: what another explanation must bring to be named
FEW = 200  # training cells
TELLS = "tells "  # before a label's name
SSE = {"aa": 1.0, "ab": -2.0, "bb": 1.0}  # squared error of a picture, from its pixel sums


def imputability(table: pd.DataFrame, trained: Mapping[str, int]) -> pd.DataFrame:
    """Score each marker.

    Parameters
    ----------
    table
        `fidelity.compare`'s, with a column `group`; of the rebuilt stains it may hold some cells alone.
    trained
        Training cells that showed each marker.

    Returns
    -------
    One row a marker. `image`: 1 - squared error of the prediction over that of the marker's mean picture, all cells'
    pixels together; `intensity`: R2 of the cells' mean intensity; both with `_low` and `_high` over groups, below 0
    where the mean would have been the better guess. `within`: R2 of intensity after each group's own means are taken
    out; `rebuilt` and `rebuilt_shared`: R2 of intensity from the stain's own latents, and from its own shared one alone
    (NaN without). `cells`, `groups`, `trained`, `reasons`.
    """
    rows = []
    for marker, part in table.groupby("marker", sort=False):
        by = {name: one.set_index("position") for name, one in part.groupby("prediction", sort=False)}
        guess, mean = by["predicted"], by.get("marker_mean")
        groups = guess["group"].to_numpy()
        real, predicted = guess["intensity_real"].to_numpy(), guess["intensity_predicted"].to_numpy()
        row: dict[str, Any] = {"marker": marker}
        scores = {"intensity": metrics.r2(groups, real, predicted)}
        if mean is not None:
            error = metrics.ratio(groups, _error(guess), _error(mean.loc[guess.index]))
            scores = {"image": lambda counts, of=error: 1 - of(counts), **scores}  # type: ignore[misc]
        for name, statistic in scores.items():
            value = metrics.estimate(groups, statistic, (-np.inf, 1.0))
            row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        row["within"] = _r2(_centred(real, groups), _centred(predicted, groups))
        for column, name in (("rebuilt", "full"), ("rebuilt_shared", "shared")):
            own = by.get(name)
            row[column] = np.nan if own is None else _r2(own["intensity_real"], own["intensity_predicted"])
        row |= {"cells": len(guess), "groups": len(np.unique(groups)), "trained": trained.get(str(marker), 0)}
        rows.append({**row, "reasons": reasons(row)})
    return pd.DataFrame(rows)


def with_labels(table: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Add ``tells <label>`` with `_low` and `_high`: the share of what the real stain tells of each label.

    Parameters
    ----------
    labels
        `verdict.judge_labels`'s; where several kinds of classifiers were asked, the first one's are taken.
    """
    for name, part in labels.groupby("label", sort=False) if len(labels) else ():
        first = part[part["backend"] == part["backend"].iloc[0]].set_index("marker")
        for end in ("", "_low", "_high"):
            table = table.assign(**{f"{TELLS}{name}{end}": table["marker"].map(first[f"share{end}"])})
    return table


def reasons(row: Mapping[str, Any]) -> str:
    """Say why a marker's brightness is not recovered better, as far as it shows."""
    said = []
    if row["trained"] < FEW:
        said.append(f"few training cells ({row['trained']})")
    known, own = max(row["intensity"], 0), np.nan_to_num(row["rebuilt_shared"])
    if row["rebuilt"] - max(known, own) > GAP:
        said.append(f"carried by the stain's own specific latent, which redraws it (R² {row['rebuilt']:.2f})")
    elif own - known > GAP:
        said.append(
            f"carried by the stain alone: its own shared latent redraws it (R² {own:.2f}), the sources' does not"
        )
    if row["within"] - max(row["intensity"], 0) > GAP:
        said.append(f"batch effect: within a group R² is {row['within']:.2f}")
    return "; ".join(said)


def assess(run: Run, store: CellStore, progress: Progress | None = None) -> Path | None:
    """Score a trained run on its validation groups, into its folder; None where it has none.

    A marker that no validation cell shows beside what it is predicted from has no row, and `warnings_of` says so. What
    is newer than the weights is not computed again. Of several processes the first one writes.
    """
    path = run.path / FILE
    if path.exists() and path.stat().st_mtime_ns > run.checkpoint.stat().st_mtime_ns:
        return path
    if not run.fabric.is_global_zero:
        return None
    stained = seen(run, store)
    train, val = sampled(run, store, stained, CELLS)
    if not len(val) or not len(train):
        return None
    found = _compared(run, store, stained, train, val, progress)
    found["group"] = store.obs[run.split.by].astype(str).to_numpy()[found["position"].to_numpy(int)]
    table = imputability(found, shown(run, store))
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(table.to_json(orient="records", indent=1) + "\n")
    partial_path.replace(path)
    return path


def _compared(
    run: Run, store: CellStore, stained: Shown, train: Rows, val: Rows, progress: Progress | None
) -> pd.DataFrame:
    """Return `fidelity.compare`'s table of the validation cells, `position` their rows in the store."""
    floors = Floors(len(run.panel), run.source_channels)
    for images, measured in unpaired(run, store, CELLS, shown=stained):
        floors.add(images, measured)
    some = val[:: max(1, len(val) // REBUILT)]
    tables, done, total = [], 0, len(train) + len(val) + len(some)
    for cells, rebuilt in ((train, False), (val, False), (some, True)):
        for part in predict_batches(run, store, cells, full=rebuilt, shared=rebuilt, latents=False, batch_size=BLOCK):
            part = replace(part, measured=part.measured & stained[part.cells])
            if cells is train:
                floors.add(part.real, part.measured)
            else:
                table = compare(part, run.panel.markers, run.panel.chromatin_index, floors, sums_only=True)
                new = table["prediction"].isin(("full", "shared")) == rebuilt
                tables.append(table.assign(position=part.cells[table["position"].to_numpy(int)])[new])
            done += len(part.cells)
            if progress:
                progress(done, total)
    return pd.concat(tables, ignore_index=True)


def shown(run: Run, store: CellStore) -> dict[str, int]:
    """Count the training cells that show each marker to the model."""
    counts = seen(run, store)[run.split.assign(store.obs) == "train"].sum(0)
    return dict(zip(run.panel.markers, map(int, counts), strict=True))


def warnings_of(run: Run, markers: Sequence[str]) -> list[str]:
    """Say which of these markers the validation groups speak against; nothing where they were not asked."""
    path = run.path / FILE
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it, and train --resume makes it again") from error
    known = {row["marker"] for row in rows}
    unseen = [m for m in markers if m not in known and m not in (run.panel.chromatin, *run.sources)]
    said = list[str]()
    if unseen:
        said.append(
            f"{', '.join(unseen)}: no validation cell shows {'it' if len(unseen) == 1 else 'them'} beside "
            f"{', '.join(run.sources)}, so how far predictions from there can be trusted is not known"
        )
    for row in rows:
        if row["marker"] not in markers:
            continue
        why = f" ({row['reasons']})" if row["reasons"] else ""
        if row.get("image") is not None and row["image"] < LOW:
            said.append(
                f"{row['marker']}: on the validation groups, predicted pictures recover little beyond the mean "
                f"picture of the stain (share {row['image']:.2f}){why}"
            )
        elif row["intensity"] is None:
            said.append(
                f"{row['marker']}: in all validation cells it is equally bright, so how far predictions can be "
                "trusted is not known"
            )
        elif row["intensity"] < LOW:
            said.append(
                f"{row['marker']}: do not rank cells by predicted brightness, on the validation groups it recovers a "
                f"share of {row['intensity']:.2f} of the real one's variation{why}"
            )
    return said


def _error(sums: pd.DataFrame) -> Any:
    return sum(weight * sums[name].to_numpy() for name, weight in SSE.items())


def _centred(values: Any, groups: Any) -> Any:
    return values - pd.Series(values).groupby(groups).transform("mean").to_numpy()


def _r2(truth: Any, guess: Any) -> float:
    """R2 over all cells."""
    return float(metrics.r2(np.zeros(len(truth)), truth, guess)(np.ones((1, 1)))[0])
