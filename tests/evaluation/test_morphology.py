"""Features of predicted against real stains: closed forms, and planted differences that come again, turn or vanish."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from imgshared.data.features import EXTENT_NAMES
from imgshared.data.panel import Panel
from imgshared.evaluation import morphology
from imgshared.evaluation.collect import Part
from imgshared.evaluation.labels import read_label
from imgshared.evaluation.verdict import differences

PANEL = Panel(("DNA", "P"), "DNA")
N, GROUPS = 400, np.arange(400) % 10


def part(change, seed=0, label=None):
    """Cells whose features are noise; `change` takes (real, predicted, positive) and plants what differs."""
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(N, len(morphology.NAMES)))
    predicted = rng.normal(size=real.shape)
    drug = rng.integers(0, 2, N)
    change(real, predicted, drug)
    names = label if label is not None else np.where(drug, "treated", "control")
    obs = pd.DataFrame({"drug": names, "group": GROUPS.astype(str)})
    both = {("P", "real"): real, ("P", "predicted"): predicted}
    return Part(np.arange(N), obs, np.ones((N, 2), bool), morphology=both)


def differ(found):
    return morphology.differ(found, PANEL, read_label(found.obs, "drug"), GROUPS)


def test_every_feature_has_a_family_and_all_families_are_told():
    families = {name: morphology.family(name) for name in morphology.NAMES}
    assert set(families.values()) == {"brightness", "radial distribution", "texture", "foci", "area and shape"}
    assert {families[n] for n in EXTENT_NAMES} == {"area and shape"}
    assert families["p95"] == families["mean_inside"] == families["skew_outside"] == "brightness"
    assert families["ring3_relative"] == families["log_ratio"] == "radial distribution"
    assert families["texture0.7_inside"] == "texture"
    assert families["spot_count_inside"] == "foci"


def test_correlations_are_of_measured_cells_and_constants_have_none():
    def plant(real, predicted, drug):
        predicted[:, 0] = real[:, 0] + 0.5 * predicted[:, 0]
        predicted[:, 1] = 0.3

    found = part(plant)
    found.measured[::4, 1] = False
    found.measured[1::4, 0] = False  # without chromatin nothing was predicted
    table = morphology.correlate(found, PANEL, GROUPS).set_index("feature")
    assert list(table.index) == list(morphology.NAMES)
    assert set(table["cells"]) == {N // 2}
    rows = np.arange(N) % 4 > 1
    x, y = (found.morphology["P", name][rows, 0] for name in ("real", "predicted"))
    assert table.loc[morphology.NAMES[0], "value"] == pytest.approx(spearmanr(x, y).statistic)
    assert table.loc[morphology.NAMES[0], "low"] > 0.7
    assert np.isnan(table.loc[morphology.NAMES[1], "value"])
    assert abs(table.loc[list(morphology.NAMES[2:]), "value"]).max() < 0.3


def test_planted_differences_are_found_again_turned_missed_and_invented():
    def plant(real, predicted, drug):
        real[:, :4] += 1.5 * drug[:, None]
        predicted[:, [0, 1]] += 1.5 * drug[:, None]
        predicted[:, 2] -= 1.5 * drug
        predicted[:, 4] += 1.5 * drug
        predicted[:, 5] = 7.0  # a constant differs in nothing

    effects, conditions = differ(part(plant))
    outcome = effects.set_index("feature")["outcome"]
    first = list(morphology.NAMES[:6])
    expected = [morphology.AGAIN, morphology.AGAIN, morphology.REVERSED, morphology.MISSED, morphology.INVENTED]
    assert list(outcome[first]) == [*expected, morphology.NEITHER]
    assert set(effects["contrast"]) == {"treated − control"}
    row = conditions.iloc[0]
    assert len(conditions) == 1
    assert row["features"] == len(morphology.NAMES)
    assert (row["again"], row["reversed"]) == (2, 1)
    assert row["differ"] == row["again"] + row["reversed"] + row["missed"] >= 4
    assert row["alone"] >= 1
    assert 0.5 <= row["same_sign"] < 1
    assert np.isfinite(row["ranking"])


def test_a_faithful_prediction_has_all_of_it_and_half_the_effect_half_the_slope():
    def plant(real, predicted, drug):
        real[:] += np.linspace(-2, 2, real.shape[1]) * drug[:, None]
        predicted[:] = real

    row = differ(part(plant))[1].iloc[0]
    assert row["again"] == row["differ"] > 30
    assert row["alone"] == row["reversed"] == row["missed"] == 0
    assert row["same_sign"] == 1
    assert row["slope"] == row["ranking"] == row["ranking_low"] == pytest.approx(1)

    def halve(real, predicted, drug):
        step = np.linspace(-2, 2, real.shape[1])
        real += step * drug[:, None]
        predicted += step / 2 * drug[:, None]

    row = differ(part(halve))[1].iloc[0]
    assert 0.4 < row["slope"] < 0.6
    assert 0.9 < row["ranking_low"] < row["ranking"] < 1


def test_what_the_mean_picture_shows_again_is_counted_apart():
    def plant(real, predicted, drug):
        for values in (real, predicted):
            for side in (drug == 0, drug == 1):
                values[side] -= values[side].mean(0)  # nothing differs by chance
            values[drug == 1, :4] += 2

    cells = part(plant)
    drug = (cells.obs["drug"] == "treated").to_numpy()
    mean = np.zeros_like(cells.morphology["P", "real"])  # it moves with the outline in two features, once the other way
    mean[drug, 0], mean[drug, 1], mean[drug, 10] = 2, -2, 2
    cells.morphology["P", "marker mean"] = mean
    effects, conditions = differ(cells)
    assert (conditions["again"].item(), conditions["by_outline"].item()) == (4, 1)
    by = effects.set_index("feature")
    assert list(by.index[by["by_outline"]]) == [morphology.NAMES[0]]
    assert by["mean_picture"].iloc[0] == pytest.approx(2, abs=0.2)
    assert by["mean_picture"].iloc[5] == 0
    (said,) = differences(conditions)
    assert "P 4 of 4. The nuclear outline alone, about one mean picture for all cells, shows P 1." in said
    cells.morphology.pop(("P", "marker mean"))
    effects, conditions = differ(cells)
    assert conditions["by_outline"].item() == 0
    assert effects["mean_picture"].isna().all()
    assert "outline" not in differences(conditions)[0]


def test_nothing_differs_where_nothing_was_planted():
    effects, conditions = differ(part(lambda *_: None))
    assert (effects["outcome"] == morphology.NEITHER).mean() > 0.85
    assert abs(conditions["slope"].item()) < 0.6


def test_three_classes_are_each_held_against_the_rest():
    kinds = np.array(["a", "b", "c"])[np.arange(N) % 3]

    def plant(real, predicted, drug):
        real[:, 0] += 3.0 * (kinds == "b")
        predicted[:, 0] += 3.0 * (kinds == "b")

    effects, conditions = differ(part(plant, label=kinds))
    assert list(conditions["contrast"]) == ["a − rest", "b − rest", "c − rest"]
    first = effects[effects["feature"] == morphology.NAMES[0]].set_index("contrast")
    assert first.loc["b − rest", "real"] > 2
    assert first.loc["a − rest", "real"] < -0.5
    assert set(first["outcome"]) == {morphology.AGAIN}


def test_cells_without_the_label_are_left_out():
    labels = np.where(np.arange(N) % 2, "treated", "control").astype(object)
    labels[:100] = None

    def plant(real, predicted, drug):
        real[:100] = 1e6

    effects, _ = differ(part(plant, label=labels))
    assert effects["real"].abs().max() < 1
