"""What the tables say, in plain words: the sentences at the top of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from imgshared.evaluation.fidelity import FLOORS

MARGIN = 0.05  # AUROC: a loss smaller than this is not held against a prediction
TOLD = 0.6  # AUROC below which a label does not count as told, however narrow the interval
CLEARS, UNCLEAR, BELOW = "clears both floors", "not clearly", "below a floor"
KEPT, PARTLY, LOST, ABSENT = "kept", "partly kept", "lost", "not in the real stain"


def judge_stains(gains: pd.DataFrame) -> pd.DataFrame:
    """Add `verdict` to `fidelity.against_floors`: both gains' intervals above zero, one of them below, or neither."""
    verdicts = []
    for row in gains.to_dict("records"):
        floors = [f for f in FLOORS if f"gain_{f}" in row and not np.isnan(row[f"gain_{f}"])]
        low = [_or(row[f"gain_{f}_low"], row[f"gain_{f}"]) for f in floors]
        high = [_or(row[f"gain_{f}_high"], row[f"gain_{f}"]) for f in floors]
        clears = bool(floors) and min(low) > 0
        verdicts.append(CLEARS if clears else BELOW if floors and min(high) < 0 else UNCLEAR)
    return gains.assign(verdict=verdicts)


def judge_labels(scores: pd.DataFrame, contrasts: pd.DataFrame) -> pd.DataFrame:
    """One row a label x marker x backend: AUROC of `real`, `predicted`, `chromatin`, and a verdict.

    ``kept``: the prediction tells the label, and the interval of its loss of AUROC stays below 0.05: non-inferior;
    ``partly kept``: it tells the label, worse or not certainly as well;
    ``lost``: the real stain tells it, the prediction does not;
    ``not in the real stain``. `beyond_chromatin` marks a prediction that tells clearly more than the chromatin it was
    made from, which asks for a second look.
    """
    rows = []
    if scores.empty:
        return pd.DataFrame()
    auroc = scores[scores["score"] == "auroc"]
    for (label, marker, backend), part in auroc.groupby(["label", "marker", "backend"], sort=False):
        by_input = {r["input"]: r for r in part.to_dict("records")}
        here = (contrasts["label"] == label) & (contrasts["marker"] == marker) & (contrasts["backend"] == backend)
        gaps = {r["contrast"]: r for r in contrasts[here].to_dict("records")}
        told = {name: _told(r) for name, r in by_input.items()}
        gap, over = gaps["predicted - real"], gaps["predicted - chromatin"]
        if not told["real"]:
            verdict = ABSENT
        elif not told["predicted"]:
            verdict = LOST
        else:
            verdict = KEPT if _or(gap["low"], gap["value"]) > -MARGIN else PARTLY
        values = {name: r["value"] for name, r in by_input.items()}
        beyond = bool(_or(over["low"], over["value"]) > MARGIN)
        row = {"label": label, "marker": marker, "backend": backend, "verdict": verdict, "beyond_chromatin": beyond}
        rows.append({**row, **values})
    return pd.DataFrame(rows)


def sentences(stains: pd.DataFrame, labels: pd.DataFrame, chromatin: str) -> list[str]:
    """Summarise in a few sentences; each stands by itself."""
    said = []
    if len(stains):
        clears, unclear, below = (_names(stains, "verdict", v, "marker") for v in (CLEARS, UNCLEAR, BELOW))
        total = len(stains)
        said.append(
            f"{len(clears)} of {total} {'stain' if total == 1 else 'stains'} predicted from {chromatin} "
            f"{'clears' if len(clears) == 1 else 'clear'} both floors on unseen groups" + _list(clears, ": ") + "."
        )
        if unclear:
            said.append(f"Not clearly better than the floors: {_list(unclear)}.")
        if below:
            said.append(f"Worse than a floor, do not use: {_list(below)}.")
    for (label, backend), part in labels.groupby(["label", "backend"], sort=False) if len(labels) else ():
        best = part.sort_values("real").iloc[-1]
        text = f"{label} ({backend}): the real stain that tells it best is {best['marker']} (AUROC {best['real']:.2f})."
        text += f" {chromatin} alone reaches {part['chromatin'].max():.2f}." if "chromatin" in part else ""
        for verdict, words in ((KEPT, "kept by predicted"), (PARTLY, "partly kept by"), (LOST, "lost in predicted")):
            found = part[part["verdict"] == verdict]
            if len(found):
                each = [f"{r['marker']} ({r['predicted']:.2f} of {r['real']:.2f})" for r in found.to_dict("records")]
                text += f" It is {words} {_list(each)}."
        if (part["verdict"] == ABSENT).all():
            text += " No real stain tells it on unseen groups."
        over = list(part.loc[part["beyond_chromatin"], "marker"])
        if over:
            text += (
                f" Predicted {_list(over)} tells clearly more than the chromatin crops that it was made from: "
                "either the stain says it in simpler features, or something leaks. Look before you use it."
            )
        said.append(text)
    return said


def differences(conditions: pd.DataFrame) -> list[str]:
    """Say of each contrast how many of the real differences in cell features the predictions show again."""
    said = []
    for (label, contrast), part in conditions.groupby(["label", "contrast"], sort=False) if len(conditions) else ():
        shown = part[part["differ"] > 0].sort_values("differ", ascending=False)
        if not len(shown):
            said.append(f"{label}, {contrast}: no measured feature of any real stain differs.")
            continue
        each = [f"{r['marker']} {r['again']} of {r['differ']}" for r in shown.to_dict("records")]
        text = f"{label}, {contrast}: features that differ in real cells and differ so again in predicted ones: "
        text += _list(each) + "."
        turned, alone = int(part["reversed"].sum()), int(part["alone"].sum())
        if turned or alone:
            text += f" {turned} differ the other way round, {alone} in predicted cells alone: do not report those."
        said.append(text)
    return said


def _told(row: Any) -> bool:
    return bool(_or(row["low"], row["value"]) > 0.5 and row["value"] >= TOLD)


def _or(bound: float, otherwise: float) -> float:
    """A single group has no interval."""
    return otherwise if np.isnan(bound) else bound


def _names(table: pd.DataFrame, column: str, value: str, name: str) -> list[str]:
    return list(table.loc[table[column] == value, name])


def _list(names: Sequence[str], before: str = "") -> str:
    names = list(names)
    if not names:
        return ""
    return before + (names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1])
