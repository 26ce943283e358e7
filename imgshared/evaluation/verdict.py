"""What the tables say, in plain words: the sentences at the top of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from imgshared import metrics
from imgshared.evaluation.classify import SHARE
from imgshared.evaluation.fidelity import FLOORS
from imgshared.evaluation.matrix import ACROSS, BOTH

SUSPECT = 0.05  # AUROC more than its source: a second look is due
TOLD = 0.6  # AUROC below which a label does not count as told, however narrow the interval
CLEARS, UNCLEAR, BELOW = "clears both floors", "not clearly", "below a floor"
NOT_INFERIOR, UNCLEAR_LABEL, INFERIOR = "not inferior", "not shown", "inferior"
LOST, ABSENT, ALONE = "lost", "not in the real stain", "in the prediction alone"
TOLD_BY_REAL = (NOT_INFERIOR, UNCLEAR_LABEL, INFERIOR, LOST)
BETTER, NO_BETTER, WORSE = "better", "not shown better", "worse"
GAPS = {
    "gap": "predicted - real",
    "gap_chromatin": "predicted - chromatin",
    "gap_added": f"{BOTH} - chromatin + {ACROSS}",
}
SAID_OF = {
    NOT_INFERIOR: "Predicted stains that tell it not inferior to the real ones:",
    UNCLEAR_LABEL: "Perhaps less well:",
    INFERIOR: "Worse:",
    LOST: "Lost in the prediction:",
    ALONE: "Told by the prediction alone, not by the real stain, so never report it of:",
}


def judge_stains(gains: pd.DataFrame) -> pd.DataFrame:
    """Add `verdict` to `fidelity.against_floors`: both gains' intervals above zero, one of them below, or neither.

    A single group has no interval (NaN), and clears nothing.
    """
    verdicts = []
    for row in gains.to_dict("records"):
        floors = [f for f in FLOORS if f"gain_{f}" in row and not np.isnan(row[f"gain_{f}"])]
        clears = bool(floors) and all(row[f"gain_{f}_low"] > 0 for f in floors)
        below = any(row[f"gain_{f}_high"] < 0 for f in floors)
        verdicts.append(CLEARS if clears else BELOW if below else UNCLEAR)
    return gains.assign(verdict=verdicts)


def judge_labels(scores: pd.DataFrame, contrasts: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Judge each label x marker x backend by AUROC on the same cells of unseen groups.

    Parameters
    ----------
    margin
        A loss of AUROC against the real stain that does not count.

    Returns
    -------
    `verdict`: ``not inferior`` (the prediction tells the label, and the whole interval of its gap to real lies above
    minus the margin), ``inferior`` (the whole interval below), ``lost`` (the same, and the prediction does not tell the
    label, which the real stain does), ``not shown`` (neither), ``in the prediction alone``, ``not in the real stain``.
    `over_chromatin`: the prediction against the chromatin it was made from, ``better``, ``not shown better``, ``worse``
    by the interval of the gap. `adds`: whether it tells something beside chromatin that another cell's prediction does
    not. `gap`, `gap_chromatin`, `gap_added`, `share` (what the prediction tells above chance, of what the real stain
    tells; NaN where that tells nothing) with `_low` and `_high`; the AUROC of every input; all of it in `words`.
    """
    rows = []
    if scores.empty:
        return pd.DataFrame()
    keys = ["label", "marker", "backend"]
    auroc = scores[scores["score"] == "auroc"]
    gaps_of = {key: part.set_index("contrast") for key, part in contrasts.groupby(keys, sort=False)}
    for key, part in auroc.groupby(keys, sort=False):
        values = dict(zip(part["input"], part["value"], strict=True))
        told = {r["input"]: _told(r) for r in part.to_dict("records")}
        gap, over, added = (_gap(gaps_of[key], name) for name in GAPS.values())
        row = dict(zip(keys, key, strict=True))
        row["verdict"] = _against_real(told["real"], told["predicted"], gap, margin)
        row["over_chromatin"] = {1: BETTER, 0: NO_BETTER, -1: WORSE}[_side(over)]
        row["adds"] = _side(added) > 0
        row["words"] = _words(row, values, gap, over, added, margin)
        for name, value in zip(GAPS, (gap, over, added), strict=True):
            row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        share = _gap(gaps_of[key], SHARE) if told["real"] else metrics.Estimate(np.nan, np.nan, np.nan)
        row |= {"share": share.value, "share_low": share.low, "share_high": share.high}
        rows.append({**row, **values})
    return pd.DataFrame(rows)


def sentences(stains: pd.DataFrame, labels: pd.DataFrame, chromatin: str, sources: Sequence[str]) -> list[str]:
    """Summarise in a few sentences; each stands by itself. `sources` are what the stains are predicted from."""
    said = []
    if len(stains):
        clears, unclear, below = (_names(stains, "verdict", v, "marker") for v in (CLEARS, UNCLEAR, BELOW))
        total = len(stains)
        said.append(
            f"{len(clears)} of {total} {'stain' if total == 1 else 'stains'} predicted from {_list(sources)} "
            f"{'clears' if len(clears) == 1 else 'clear'} both floors on the judged groups" + _list(clears, ": ") + "."
        )
        if unclear:
            said.append(f"Not clearly better than the floors: {_list(unclear)}.")
        if below:
            said.append(f"Worse than a floor, do not use: {_list(below)}.")
    for (label, backend), part in labels.groupby(["label", "backend"], sort=False) if len(labels) else ():
        best = part.sort_values("real").iloc[-1]
        text = f"{label} ({backend}): the real stain that tells it best is {best['marker']} (AUROC {best['real']:.2f})."
        text += f" {chromatin} alone reaches {part['chromatin'].max():.2f}." if "chromatin" in part else ""
        for verdict, words in SAID_OF.items():
            found = part[part["verdict"] == verdict]
            if len(found):
                each = [f"{r['marker']} ({r['predicted']:.2f} of {r['real']:.2f})" for r in found.to_dict("records")]
                text += f" {words} {_list(each)}."
        if not part["verdict"].isin(TOLD_BY_REAL).any():
            text += " No real stain tells it."
        over = list(part.loc[part["gap_chromatin_low"] > SUSPECT, "marker"])
        verb = "tells" if len(over) == 1 else "tell"
        if over and list(sources) == [chromatin]:
            text += (
                f" Predicted {_list(over)} {verb} clearly more than the chromatin crops behind the prediction: "
                "either it says the same in simpler features, or something leaks. Look before you use it."
            )
        elif over:
            text += f" Predicted {_list(over)} {verb} clearly more than {chromatin} alone, as {_list(sources)} may."
        said.append(text)
    return said


def unsound(controls: pd.DataFrame) -> list[str]:
    """Say which controls did not come out as they must: no verdict on their labels holds."""
    failed = controls[~controls["sound"]] if len(controls) else controls
    return [
        f"{r['label']} ({r['backend']}): {r['control']} must be at chance and reaches AUROC {r['value']:.2f}"
        + ("" if np.isnan(r["low"]) else f" [{r['low']:.2f}, {r['high']:.2f}]")
        for r in failed.to_dict("records")
    ]


def stamps(leaks: Sequence[str], controls: pd.DataFrame, cautions: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """Return what every page must bear, and why: (words, reasons), the gravest first."""
    every = (
        ("Leaking: do not cite", leaks), ("Unsound: do not use its verdicts", unsound(controls)), ("Caution", cautions)
    )  # fmt: skip
    return [(words, reasons) for words, reasons in every if reasons]


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
        if shown["by_outline"].any():
            floor = [f"{r['marker']} {r['by_outline']}" for r in shown.to_dict("records") if r["by_outline"]]
            text += f" The nuclear outline alone, about one mean picture for all cells, shows {_list(floor)}."
        turned, alone = int(part["reversed"].sum()), int(part["alone"].sum())
        if turned or alone:
            text += f" {turned} differ the other way round, {alone} in predicted cells alone: do not report those."
        said.append(text)
    return said


def _gap(gaps: pd.DataFrame, name: str) -> metrics.Estimate:
    return metrics.Estimate(*gaps.loc[name, ["value", "low", "high"]].astype(float))


def _side(gap: metrics.Estimate) -> int:
    """Return 1 where a gap lies above zero, -1 below, 0 where its interval holds zero or there is none."""
    return int(gap.low > 0) - int(gap.high < 0)


def _against_real(real: bool, predicted: bool, gap: metrics.Estimate, margin: float) -> str:
    if not real:
        return ALONE if predicted else ABSENT
    if gap.high < -margin:
        return INFERIOR if predicted else LOST
    return NOT_INFERIOR if predicted and gap.low > -margin else UNCLEAR_LABEL


def _words(
    row: dict[str, Any],
    auroc: dict[str, float],
    gap: metrics.Estimate,
    over: metrics.Estimate,
    added: metrics.Estimate,
    margin: float,
) -> str:
    """Put a verdict in words, with its numbers."""
    label, marker, verdict = row["label"], row["marker"], row["verdict"]
    if verdict == ABSENT:
        return f"Real {marker} is not shown to tell {label} (AUROC {auroc['real']:.2f}): nothing to keep."
    numbers = f"AUROC {auroc['predicted']:.2f} against {auroc['real']:.2f}, {_signed(gap.value)}{_interval(gap)}"
    first = {
        ALONE: f"Predicted {marker} tells {label}, which real {marker} is not shown to ({numbers}): it repeats what it "
        "was made from.",
        NOT_INFERIOR: f"Predicted {marker} tells {label} not inferior to the real stain within {margin:g} ({numbers}).",
        UNCLEAR_LABEL: f"Whether predicted {marker} tells {label} as well as the real stain within {margin:g} is not "
        f"shown ({numbers}).",
        INFERIOR: f"Predicted {marker} tells {label} worse than the real stain by more than {margin:g} ({numbers}).",
        LOST: f"Predicted {marker} has lost {label}, which the real stain tells ({numbers}).",
    }[verdict]
    second = {BETTER: "better", NO_BETTER: "not shown to be better", WORSE: "worse"}[row["over_chromatin"]]
    second = f"It is {second} than chromatin alone ({_signed(over.value)}{_interval(over)})"
    third = "adds to it" if row["adds"] else "is not shown to add to it"
    return f"{first} {second} and {third} ({_signed(added.value)}{_interval(added)})."


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _interval(value: metrics.Estimate) -> str:
    return "" if np.isnan(value.low) else f" [{_signed(value.low)}, {_signed(value.high)}]"


def _told(row: Any) -> bool:
    """Say whether a label is told: clearly, or, of a single group, which has no interval, by its value alone."""
    return bool(row["value"] >= TOLD and not row["low"] <= 0.5)


def _names(table: pd.DataFrame, column: str, value: str, name: str) -> list[str]:
    return list(table.loc[table[column] == value, name])


def _list(names: Sequence[str], before: str = "") -> str:
    names = list(names)
    if not names:
        return ""
    return before + (names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1])
