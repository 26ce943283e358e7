"""Verdicts follow the intervals, and say their numbers."""

import numpy as np
import pandas as pd
import pytest

from imgshared.evaluation import verdict
from imgshared.evaluation.classify import SHARE
from imgshared.evaluation.matrix import ACROSS, BOTH

ROW = {"label": "drug", "marker": "P", "backend": "features"}


def judged(real=0.9, predicted=0.88, gap=(-0.02, 0.01), over=(-0.02, 0.01), added=(-0.01, 0.01), margin=0.05):
    def score(name, value):
        return {**ROW, "input": name, "score": "auroc", "value": value, "low": value - 0.03, "high": value + 0.03}

    def contrast(name, low, high):
        return {**ROW, "contrast": name, "value": (low + high) / 2, "low": low, "high": high}

    scores = pd.DataFrame([score("real", real), score("predicted", predicted), score("chromatin", 0.85)])
    contrasts = [contrast("predicted - real", *gap), contrast("predicted - chromatin", *over)]
    contrasts += [contrast(f"{BOTH} - chromatin + {ACROSS}", *added), contrast(SHARE, 0.8, 1.0)]
    return verdict.judge_labels(scores, pd.DataFrame(contrasts), margin).iloc[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "not inferior"),
        ({"margin": 0.01}, "not shown"),
        ({"gap": (-0.2, -0.1)}, "inferior"),
        ({"gap": (-0.2, -0.03)}, "not shown"),
        ({"gap": (-0.2, -0.1), "margin": 0.3}, "not inferior"),
        ({"predicted": 0.52, "gap": (-0.5, -0.3)}, "lost"),
        ({"predicted": 0.52, "gap": (-0.8, 0.02)}, "not shown"),
        ({"real": 0.55}, "in the prediction alone"),
        ({"real": 0.55, "predicted": 0.55}, "not in the real stain"),
    ],
)
def test_a_verdict_follows_the_interval_of_the_gap(change, expected):
    assert judged(**change)["verdict"] == expected


def test_a_share_is_given_of_what_the_real_stain_tells():
    assert judged()["share"] == pytest.approx(0.9)
    assert np.isnan(judged(real=0.55)["share"])


def test_a_verdict_names_margin_and_numbers():
    row = judged(over=(0.02, 0.06), added=(0.01, 0.03))
    assert row["over_chromatin"] == "better"
    assert row["adds"]
    assert "not inferior to the real stain within 0.05 (AUROC 0.88 against 0.90" in row["words"]
    assert "better than chromatin alone (+0.04 [+0.02, +0.06]) and adds to it (+0.02 [+0.01, +0.03])" in row["words"]
    worse = judged(over=(-0.1, -0.05))
    assert worse["over_chromatin"] == "worse"
    assert "is not shown to add to it" in worse["words"]


def test_one_group_has_no_interval_and_shows_nothing():
    nothing = (np.nan, np.nan)
    row = verdict.judge_labels(
        pd.DataFrame(
            [
                {**ROW, "input": name, "score": "auroc", "value": value, "low": np.nan, "high": np.nan}
                for name, value in (("real", 0.9), ("predicted", 0.8), ("chromatin", 0.7))
            ]
        ),
        pd.DataFrame(
            [
                {**ROW, "contrast": name, "value": value, "low": nothing[0], "high": nothing[1]}
                for name, value in zip((*verdict.GAPS.values(), SHARE), (-0.1, 0.1, 0.0, 0.75), strict=True)
            ]
        ),
        0.05,
    ).iloc[0]
    assert (row["verdict"], row["over_chromatin"], bool(row["adds"])) == ("not shown", "not shown better", False)
    assert "[" not in row["words"]


def test_an_unsound_control_is_shouted():
    row = {"label": "drug", "backend": "features", "control": "marker mean", "low": 0.7, "high": 0.9}
    table = pd.DataFrame([{**row, "value": 0.8, "sound": False}, {**row, "value": 0.5, "sound": True}])
    (said,) = verdict.unsound(table)
    assert said == "drug (features): marker mean must be at chance and reaches AUROC 0.80 [0.70, 0.90]"
    assert verdict.stamps(["seen"], table, []) == [("Leaking: do not cite", ["seen"]),
                                                   ("Unsound: do not use its verdicts", [said])]  # fmt: skip
    assert verdict.stamps([], pd.DataFrame(), []) == []
    (alone,) = verdict.unsound(table.head(1).assign(low=np.nan, high=np.nan))  # one group: no interval
    assert alone.endswith("AUROC 0.80")
