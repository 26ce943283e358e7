"""The report's tables: (headings, rows of cells), from the tables of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from imgshared.evaluation.figures import SAID
from imgshared.evaluation.imputability import TELLS
from imgshared.evaluation.verdict import GAPS

SCORES = {  # column: heading
    "pearson": "Pearson r, per cell",
    "pearson_pooled": "Pearson r, all pixels",
    "ssim": "SSIM",
    "l1": "L1",
    "detail": "detail, predicted over real",
    "kid": "KID",
    "intensity_pearson": "intensity, Pearson",
    "intensity_spearman": "intensity, Spearman",
}


@dataclass(frozen=True)
class Cell:
    """A table cell: text, a finer text below it, the value to sort by, and a heat between 0 and 1."""

    text: str
    below: str = ""
    sort: str | float = ""
    heat: float | None = None
    chip: str = ""


Table = tuple[list[str], list[list[Cell]]]


def _value(row: Any, *, heat: tuple[float, float] | None = None) -> Cell:
    value, low, high = float(row["value"]), float(row["low"]), float(row["high"])
    if np.isnan(value):
        return Cell("–", sort=-9e9)
    warmth = None if heat is None else float(np.clip((value - heat[0]) / (heat[1] - heat[0]), 0, 1))
    return Cell(_fixed(value), "" if np.isnan(low) else f"{_fixed(low)} to {_fixed(high)}", value, warmth)


def _fixed(value: float) -> str:
    """Two decimals, a true minus sign, and no minus before zero."""
    return f"{value:z.2f}".replace("-", "−")


def _number(value: float) -> Cell:
    return Cell("–", sort=-9e9) if np.isnan(value) else Cell(_fixed(value), sort=float(value))


def _text(text: Any, chip: str = "") -> Cell:
    return Cell(str(text), sort=str(text).lower(), chip=chip)


def _count(value: int) -> Cell:
    return Cell(f"{value:,}", sort=value)


def stain_table(stains: pd.DataFrame) -> Table:
    """Each predicted stain beside the two floors, with its verdict."""
    head = ["stain", "verdict", "predicted", "linear", "mean picture", "gain over linear", "gain over mean picture"]
    chips = {"clears both floors": "good", "not clearly": "plain", "below a floor": "bad"}
    rows = []
    for row in stains.to_dict("records"):
        cells = [_text(row["marker"]), _text(row["verdict"], chips[row["verdict"]]), _number(row["predicted"])]
        cells += [_number(row.get(floor, np.nan)) for floor in ("linear", "marker_mean")]
        for floor in ("linear", "marker_mean"):
            names = ("value", f"gain_{floor}"), ("low", f"gain_{floor}_low"), ("high", f"gain_{floor}_high")
            cells.append(_value({k: row.get(name, np.nan) for k, name in names}))
        rows.append(cells)
    return head, rows


def label_table(table: pd.DataFrame) -> Table | None:
    """The verdict on each label and stain with its numbers; None without labels."""
    if table.empty:
        return None
    chips = {"not inferior": "good", "not shown": "plain", "inferior": "bad", "lost": "bad",
             "in the prediction alone": "bad"}  # fmt: skip
    head = ["label", "stain", "classifier", "predicted against real", "real", "predicted", "predicted − real",
            "against chromatin", "added to chromatin"]  # fmt: skip
    rows = []
    for r in table.to_dict("records"):
        cells = [_text(r[c]) for c in ("label", "marker", "backend")]
        cells += [_text(r["verdict"], chips.get(r["verdict"], "faint")), _number(r["real"]), _number(r["predicted"])]
        cells += [_value({"value": r[n], "low": r[f"{n}_low"], "high": r[f"{n}_high"]}) for n in GAPS]
        rows.append(cells)
    return head, rows


def agreement_table(table: pd.DataFrame) -> Table | None:
    """Kappa of the answers to real and to predicted stains, a row a label, stain and backend; None without labels."""
    if table.empty:
        return None
    kinds = list(dict.fromkeys(table["prediction"]))
    rows = []
    for keys, part in table.groupby(["label", "marker", "backend"], sort=False):
        found = {r["prediction"]: r for r in part.to_dict("records")}
        rows.append([*(_text(k) for k in keys), *(_value(found[k], heat=(0.0, 1.0)) for k in kinds)])
    return ["label", "stain", "classifier", *kinds], rows


def control_table(table: pd.DataFrame) -> Table | None:
    """The controls of each label; None without labels."""
    if table.empty:
        return None
    rows = [
        [*(_text(r[c]) for c in ("label", "backend", "control")), _value(r),
         _text("as it should" if r["sound"] else "UNSOUND", "good" if r["sound"] else "bad")]
        for r in table.to_dict("records")
    ]  # fmt: skip
    return ["label", "classifier", "control", "AUROC", "at chance"], rows


def fidelity_table(fidelity: pd.DataFrame) -> Table:
    """Every score of every prediction, a row a stain and prediction."""
    rows = []
    for (marker, prediction), part in fidelity.groupby(["marker", "prediction"], sort=False):
        scores = part.set_index("score")
        first = part.iloc[0]
        rows.append(
            [
                _text(marker),
                _text(SAID.get(str(prediction), prediction)),
                *(_value(scores.loc[s]) if s in scores.index else _text("–") for s in SCORES),
            ]
        )
        rows[-1] += [_count(int(first["cells"])), _count(int(first["groups"]))]
    return ["stain", "prediction", *SCORES.values(), "cells", "groups"], rows


def imputability_table(table: pd.DataFrame) -> Table:
    """The share of each stain's variation that is recovered on unseen groups, and why not more."""
    tells = [c for c in map(str, table) if c.startswith(TELLS) and not c.endswith(("_low", "_high"))]
    rows = []
    for r in table.to_dict("records"):
        cells = [_text(r["marker"])]
        for name in ("image", "intensity", *tells):
            value = {k: r.get(f"{name}{end}", np.nan) for k, end in (("value", ""), ("low", "_low"), ("high", "_high"))}
            cells.append(_value(value, heat=(0.0, 1.0)))
        cells += [_number(r["within"]), _number(r["rebuilt"]), _text(r["reasons"]), _count(int(r["trained"]))]
        rows.append(cells)
    head = ["stain", "picture", "intensity", *tells, "intensity within groups", "intensity, rebuilt", "why not more",
            "training cells"]  # fmt: skip
    return head, rows


def coverage_table(table: pd.DataFrame) -> Table | None:
    """Share of pixels and cells within their intervals, and of cells better not predicted; None without calibration."""
    if table.empty:
        return None
    rows = []
    for marker, part in table.groupby("marker", sort=False):
        scores = part.set_index("score")
        rows.append([_text(marker), *(_value(scores.loc[name]) for name in ("pixels", "cell", "abstain"))])
        limit = float(scores["value"]["limit"])
        rows[-1] += [_number(limit) if np.isfinite(limit) else _text("never"), _count(int(part["cells"].iloc[0]))]
    head = ["stain", "pixels within", "cell means within", "better not predicted", "from a half width of", "cells"]
    return head, rows


def check_table(table: pd.DataFrame) -> Table | None:
    """What predictions invent, miss or ignore, a row a stain; None without any."""
    if table.empty:
        return None
    head = {"objects": "real objects a cell", "found": "found again", "invented": "invented",
            "own": "own source, gain in r", "moves": "varies between cells"}  # fmt: skip
    rows = []
    for marker, part in table.groupby("marker", sort=False):
        scores = part.set_index("score")
        rows.append([_text(marker), *(_value(scores.loc[name]) for name in head), _count(int(part["cells"].iloc[0]))])
    return ["stain", *head.values(), "cells"], rows


def group_table(table: pd.DataFrame, group: str) -> Table:
    """The same scores by group."""
    rows = [
        [
            _text(r["marker"]),
            _text(r["group"]),
            _text(SAID.get(r["prediction"], r["prediction"])),
            *(_number(r.get(s, np.nan)) for s in SCORES),
            _count(int(r["cells"])),
        ]
        for r in table.to_dict("records")
    ]
    return ["stain", group, "prediction", *SCORES.values(), "cells"], rows


def classifier_table(table: pd.DataFrame) -> Table | None:
    """Every classifier's scores, a row a label, stain, backend and input; None without labels."""
    if table.empty:
        return None
    rows = []
    for keys, part in table.groupby(["label", "marker", "backend", "input"], sort=False):
        scores, first = part.set_index("score"), part.iloc[0]
        rows.append([*(_text(SAID.get(str(k), str(k))) for k in keys), _value(scores.loc["auroc"])])
        rows[-1] += [_value(scores.loc["balanced_accuracy"]), _number(1 / int(first["classes"]))]
        rows[-1] += [_count(int(first["cells"])), _count(int(first["groups"]))]
    head = [
        "label",
        "stain",
        "classifier",
        "input",
        "AUROC",
        "balanced accuracy",
        "its chance level",
        "cells",
        "groups",
    ]
    return head, rows


def probe_table(table: pd.DataFrame) -> Table | None:
    """Latents as rows, targets as columns, shaded from chance (0) to perfect (1)."""
    if table.empty:
        return None
    table = table[table["score"].isin(["auroc", "r2"])]
    targets = list(dict.fromkeys(zip(table["target"], table["score"], strict=True)))
    at = {(r["latent"], r["target"], r["score"]): r for r in table.to_dict("records")}
    span = {"auroc": (0.5, 1.0), "r2": (0.0, 1.0)}
    rows = []
    for latent in dict.fromkeys(table["latent"]):
        cells = [at.get((latent, *target)) for target in targets]
        values = [_value(c, heat=span[t[1]]) if c else Cell("–") for c, t in zip(cells, targets, strict=True)]
        rows.append([_text(latent), *values])
    said = {"auroc": "AUROC", "r2": "R²"}
    return ["latent", *(f"{t}, {said[s]}" for t, s in targets)], rows


def feature_table(features: pd.DataFrame) -> Table | None:
    """Stains as rows, families of features as columns: the median correlation and the span of all of them."""
    if features.empty:
        return None
    families = list(dict.fromkeys(features["family"]))
    rows = []
    for marker, part in features.groupby("marker", sort=False):
        cells = []
        for family in families:
            values = part.loc[part["family"] == family, "value"].dropna()
            span = {"value": values.median(), "low": values.min(), "high": values.max()}
            cells.append(_value(span, heat=(0.0, 1.0)))
        rows.append([_text(marker), *cells, _count(int(part["cells"].iloc[0]))])
    return ["stain", *families, "cells"], rows


def condition_table(conditions: pd.DataFrame) -> Table | None:
    """How the differences between classes come out in predicted stains, a row a contrast and stain."""
    if conditions.empty:
        return None
    counts = ("differ", "again", "by_outline", "missed", "reversed", "alone")
    head = ["label", "contrast", "stain", "differ in real", "found again", "by outline alone", "missed", "reversed",
            "in the prediction alone", "same sign", "slope", "ranking"]  # fmt: skip
    rows = []
    for row in conditions.to_dict("records"):
        rank = {"value": row["ranking"], "low": row["ranking_low"], "high": row["ranking_high"]}
        rows.append([*(_text(row[c]) for c in ("label", "contrast", "marker")), *(_count(row[c]) for c in counts),
                     _number(row["same_sign"]), _number(row["slope"]), _value(rank)])  # fmt: skip
    return head, rows
