"""Which classifier is given what: rows match, swaps stay on their side of a fold, all inputs are of the same cells."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from imgshared.config import EvaluateConfig
from imgshared.data.panel import Panel
from imgshared.evaluation import controls
from imgshared.evaluation.classify import classify
from imgshared.evaluation.collect import Part
from imgshared.evaluation.labels import permuted
from imgshared.evaluation.matrix import MATRIX, Case, Fit, name_of
from imgshared.evaluation.solve import solve

PANEL = Panel(("DNA", "P"), "DNA")
CONFIG = EvaluateConfig(labels=("drug",))
N, GROUPS = 480, 12


def part(real=2.0, predicted=2.0, chromatin=0.0, leak=0.0, seed=0, cells=N):
    """Cells whose features tell the class by so much each; `leak` moves a constant picture with the class."""
    rng = np.random.default_rng(seed)
    drug = rng.integers(0, 2, cells)
    own = rng.normal(size=cells)  # a cell's own: real and predicted share it

    def tells(much, noise):
        x = rng.normal(size=(cells, 4)) * noise
        x[:, 0] += much * drug + own
        return x.astype(np.float32)

    features = {
        ("P", "real"): tells(real, 0.5),
        ("P", "predicted"): tells(predicted, 0.5),
        ("DNA", "chromatin"): (rng.normal(size=(cells, 5)) + chromatin * drug[:, None]).astype(np.float32),
        ("P", "marker mean"): np.full((cells, 4), 0.3, np.float32) + leak * drug[:, None],
    }
    names = [f"cell{seed}_{i}" for i in range(cells)]
    obs = pd.DataFrame({"drug": np.where(drug, "treated", "control")}, index=names)
    obs["group"] = [f"{seed}_{i % GROUPS}" for i in range(cells)]
    return Part(np.arange(cells), obs, np.ones((cells, 2), bool), features)


def auroc(found, given):
    table = found.scores[(found.scores["input"] == given) & (found.scores["score"] == "auroc")]
    return table["value"].item()


def test_every_classifier_of_the_matrix_is_there_and_tells_what_it_can():
    found = classify(part(chromatin=0.4), (), PANEL, CONFIG)
    named = {name_of(learn, t) for learn, tests in MATRIX.items() for t in tests} - {"full", "shared"}
    assert set(found.scores["input"]) == named
    assert set(found.scores["cells"]) == {N}
    assert auroc(found, "real") > 0.85
    assert auroc(found, "real → predicted") == pytest.approx(auroc(found, "real"), abs=0.05)
    assert auroc(found, "real → swapped within label") == pytest.approx(auroc(found, "real → predicted"), abs=1e-12)
    assert 0.4 < auroc(found, "real → swapped") < 0.6
    assert auroc(found, "marker mean") == 0.5
    assert auroc(found, "chromatin + predicted") > auroc(found, "chromatin") + 0.1
    assert auroc(found, "chromatin + swapped") < auroc(found, "chromatin") + 0.02


def test_the_share_of_what_the_real_stain_tells():
    found = classify(part(predicted=0.7), (), PANEL, CONFIG)
    share = found.contrasts.set_index("contrast").loc["share of real above chance"]
    assert share["value"] == pytest.approx((auroc(found, "predicted") - 0.5) / (auroc(found, "real") - 0.5))
    assert share["low"] < share["value"] < min(share["high"], 1)


def test_agreement_beyond_the_label_is_the_cells_own():
    kappa = classify(part(), (), PANEL, CONFIG).agreement.set_index("prediction")
    assert kappa.loc["predicted", "value"] > kappa.loc["swapped within label", "high"]
    assert kappa.loc["swapped within label", "value"] > 0.2 > kappa.loc["swapped", "high"]


def test_swapped_predictions_come_from_the_same_rows_and_class():
    held = part()
    case = Case(held, PANEL, "P", "features", 2, CONFIG)
    rows = np.arange(0, N, 3)
    codes = (held.obs["drug"] == "treated").to_numpy(int)[rows]
    own = held.features["P", "predicted"][rows]
    for name in ("swapped", "swapped within label"):
        given = case._view(held, (name,), rows, codes).take()
        assert not np.array_equal(given, own)
        order = [int(np.flatnonzero((own == row).all(1))[0]) for row in given]
        assert sorted(order) == list(range(len(rows)))  # other cells of the same side, each once
        if name != "swapped":
            assert np.array_equal(codes[order], codes)
    both = case._view(held, ("chromatin", "swapped"), rows, codes).take()
    assert np.array_equal(both[:, :5], held.features["DNA", "chromatin"][rows])


def test_crops_stand_side_by_side_as_channels():
    held = part()
    held.crops = {("P", "predicted"): np.zeros((N, 8, 8), np.float16), ("DNA", "chromatin"): np.ones((N, 8, 8))}
    case = Case(held, PANEL, "P", "cnn", 2, CONFIG)
    rows = np.arange(6)
    given = case._view(held, ("chromatin", "predicted"), rows, rows % 2).take()
    assert given.shape == (6, 2, 8, 8)
    assert given[:, 0].all()
    assert not given[:, 1].any()
    assert next(learn for learn, _ in case.routes([Fit(held, rows, rows % 2, rows, rows % 2)])) == (
        "predicted",
    )  # nothing real is kept


def test_traded_labels_keep_groups_and_tell_little_of_the_truth():
    groups = np.arange(240) % 8
    whole = (groups % 2).astype(np.intp)  # a class a group
    for new in permuted(whole, groups, 5, 0):
        assert all(len(set(new[groups == g])) == 1 for g in range(8))
        assert abs(np.corrcoef(new, whole)[0, 1]) < 0.3
        assert set(new) == {0, 1}
    assert permuted(np.zeros(240, np.intp), groups, 5, 0)[0].sum() == 0


def test_no_side_is_left_with_one_class_by_a_trade():
    """It would tell least of the truth, and no classifier could be judged by it."""
    groups = np.repeat(np.arange(8), 20)
    codes, held = (groups % 2).astype(np.intp), groups >= 6
    drawn = permuted(codes, groups, 10, 0, [held, ~held])
    assert len(drawn) == 10
    assert all(len(set(new[held])) == len(set(new[~held])) == 2 for new in drawn)


def test_controls_of_a_sound_study_are_at_chance():
    found = classify(part(), (), PANEL, CONFIG)
    table = found.controls.set_index("control")
    assert set(table.index) == {"labels permuted across groups", "marker mean"}
    assert table["sound"].all()
    assert 0.4 < table.loc["labels permuted across groups", "value"] < 0.55


def test_a_leak_through_what_should_be_constant_is_caught():
    table = classify(part(leak=1.0), (), PANEL, CONFIG).controls.set_index("control")
    assert not table.loc["marker mean", "sound"]
    assert table.loc["marker mean", "value"] > 0.9


@pytest.mark.parametrize("apart", [False, True], ids=["among the judged", "from training cells"])
def test_cells_that_tell_permuted_labels_are_caught(apart):
    """Twins on both sides: the classifier remembers the cell, not the class."""
    held = part(real=0.0, cells=240)
    rng = np.random.default_rng(1)
    held.features["P", "real"] = rng.normal(size=(240, 400)).astype(np.float32)
    rows = np.arange(240)
    codes = (held.obs["drug"] == "treated").to_numpy(np.intp)
    case = Case(held, PANEL, "P", "features", 2, CONFIG)
    leaking = [Fit(dataclasses.replace(held) if apart else held, rows, codes, rows, codes)]
    asked = list(controls.permute(case, leaking))
    answers = iter(solve([job for control in asked for job in control.jobs], CONFIG, None, lambda *said: None))
    values = [control.auroc(answers) for control in asked]
    assert len(values) == controls.COUNT["features"]
    table = controls.judge(pd.DataFrame({"label": "drug", "backend": "features", "value": values}), pd.DataFrame())
    assert not table["sound"].item()


def test_classifiers_of_two_imputers_learn_from_their_own_training_cells():
    """The second imputer's prediction is turned round: only its own training cells say so."""
    held, first, second = part(), part(seed=1), part(seed=2)
    rows = np.arange(N)
    groups = held.obs["group"].str.split("_").str[1].astype(int).to_numpy()
    late = groups >= GROUPS // 2
    for one, where in ((second, slice(None)), (held, late)):
        one.features["P", "predicted"][where] *= -1
    both = classify(held, [(first, rows[~late]), (second, rows[late])], PANEL, CONFIG)
    assert set(both.scores["cells"]) == {N}
    assert auroc(both, "predicted") > 0.85
    assert both.controls["sound"].all()
    wrong = classify(held, [(first, rows[~late]), (first, rows[late])], PANEL, CONFIG)
    assert auroc(wrong, "predicted") < 0.7


def test_labels_are_traded_on_both_sides_where_classifiers_learn_from_training_cells():
    found = classify(part(), [(part(seed=1), np.arange(N))], PANEL, CONFIG)
    table = found.controls.set_index("control")
    assert table["sound"].all()
    assert auroc(found, "predicted") > 0.85


def test_the_control_that_fails_is_shown_and_not_a_wider_one_above_it():
    scores = pd.DataFrame(
        [{"label": "drug", "backend": "features", "input": "marker mean", "score": "auroc", "value": value, "low": low,
          "high": 0.8} for value, low in ((0.62, 0.45), (0.60, 0.57), (0.5, 0.5))]
    )  # fmt: skip
    table = controls.judge(pd.DataFrame(), scores)
    assert table["value"].item() == 0.60
    assert not table["sound"].item()


def test_cells_without_a_label_are_counted_and_left_out():
    lacking = part()
    obs = lacking.obs.copy()
    obs.iloc[:30, obs.columns.get_loc("drug")] = None
    obs.iloc[30:40, obs.columns.get_loc("drug")] = "washed out"
    config = EvaluateConfig(labels=("drug",), label_values=("control", "treated"))
    found = classify(dataclasses.replace(lacking, obs=obs), (), PANEL, config)
    assert found.notes[0] == (
        "drug: 30 cells have no value and 10 cells have a value that was not asked for; left out of the classifiers"
    )
    assert set(found.scores["cells"]) == {N - 40}
