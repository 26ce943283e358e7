"""KID of per-cell features: 0 for one distribution, larger the further off, the same as its double sum."""

import numpy as np
import pandas as pd
import pytest

from imgshared import metrics
from imgshared.data.panel import Panel
from imgshared.evaluation.agreement import CLIP
from imgshared.evaluation.collect import MEAN, Part
from imgshared.evaluation.realism import LEAST, paired_distance, realism

PANEL = Panel(("DNA", "P", "Q"), "DNA")
ONE = np.ones((1, 1))
rng = np.random.default_rng(0)


def slow(x, y):
    """Mean over all pairs of different cells of k(x, x') + k(y, y') - k(x, y') - k(y, x')."""

    def kernel(a, b):
        return (np.dot(a, b) / len(a) + 1) ** 3

    n = len(x)
    terms = [
        kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(y[i], x[j])
        for i in range(n)
        for j in range(n)
        if i != j
    ]
    return np.mean(terms)


def test_it_is_its_double_sum_over_all_cells_of_a_group_and_without_one():
    x, groups = rng.normal(size=(30, 4)), np.repeat(["a", "b", "c"], (5, 11, 14))
    y = x + 0.5 * rng.normal(size=x.shape) + 0.3
    distance = paired_distance(groups, x, y)
    assert distance(np.ones((1, 3)))[0] == pytest.approx(slow(x, y))
    order = rng.permutation(30)
    assert paired_distance(groups[order], x[order], y[order])(np.ones((1, 3)))[0] == pytest.approx(slow(x, y))
    for g, name in enumerate("abc"):
        own, rest = groups == name, groups != name
        assert distance(np.eye(3))[g] == pytest.approx(slow(x[own], y[own]))
        assert distance(1 - np.eye(3))[g] == pytest.approx(slow(x[rest], y[rest]))
    assert np.isnan(paired_distance([0], x[:1], y[:1])(ONE)[0])


def test_without_the_pairs_of_a_cell_with_itself_it_is_the_kernel_distance():
    x, y = rng.normal(size=(50, 5)), rng.normal(size=(50, 5)) + 0.4
    itself = ((x * y).sum(1) / 5 + 1) ** 3
    cross = ((x @ y.T / 5 + 1) ** 3).mean()
    without = 2 * (cross - ((x @ y.T / 5 + 1) ** 3).sum() / (50 * 49) + itself.sum() / (50 * 49))
    assert paired_distance(np.zeros(50), x, y)(ONE)[0] == pytest.approx(metrics.kernel_distance(x, y) + without)


def test_a_perfect_prediction_is_at_0_however_few_the_cells():
    few = rng.normal(size=(10, 45))
    assert paired_distance(np.zeros(10), few, few)(ONE)[0] == pytest.approx(0, abs=1e-9)
    assert metrics.kernel_distance(few, few) < -1  # a cell is compared with itself there


def test_it_is_unbiased_where_predicted_follows_real():
    found = []
    for _ in range(200):
        shared, a, b = rng.normal(size=(3, 40, 6))
        found.append(paired_distance(np.zeros(40), shared + a, shared + b)(ONE)[0])  # one distribution, paired cells
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


@pytest.fixture(scope="module")
def parts():
    """Training and test cells whose `full` is another draw of what is real, and the other guesses further off."""

    def part(sizes, **guesses):
        groups = np.repeat([f"g{k}" for k in range(len(sizes))], sizes)
        made = Part(np.arange(len(groups)), pd.DataFrame({"group": groups}), np.ones((len(groups), 3), bool))
        made.measured[::5, 1] = made.measured[1::5, 0] = False
        made.measured[:, 2] = False
        shape = len(groups), 8
        made.features["P", "real"] = rng.normal(7, 3, shape)
        for name, (shift, spread) in guesses.items():
            made.features["P", MEAN if name == "mean" else name] = rng.normal(7 + shift, spread, shape)
        for values in made.features.values():
            values[~made.measured[:, [0, 1]].all(1)] = 1e9  # must never be looked at
        return made

    train = part([300, 300])
    return train, part([400, 400, 30], full=(0, 3), predicted=(2, 3), linear=(4, 1), mean=(6, 0))


def test_guesses_are_ranked_beside_the_floors_with_intervals(parts):
    train, test = parts
    table, by_group = realism(test, [train], PANEL, test.obs["group"])
    assert set(table["marker"]) == {"P"}
    assert set(table["score"]) == {"kid"}
    found = table.set_index("prediction")
    assert list(found.index) == ["predicted", "full", "linear", "marker_mean"]
    assert abs(found.loc["full", "value"]) < 0.02
    assert 0.02 < found.loc["predicted", "value"] < found.loc["linear", "value"] < found.loc["marker_mean", "value"]
    assert found.loc["full", "low"] < 0 < found.loc["full", "high"]
    assert (found["low"] < found["value"]).all()
    assert set(found["cells"]) == {498}
    assert set(found["groups"]) == {3}
    assert set(by_group["group"]) == {"g0", "g1"}  # the third has too few cells
    assert LEAST > 18
    own = by_group.query("prediction == 'predicted'")["kid"]
    np.testing.assert_allclose(own, found.loc["predicted", "value"], rtol=0.5)


def test_the_scale_is_that_of_real_training_cells_and_features_are_clipped(parts):
    train, test = parts
    stained = test.measured[:, [0, 1]].all(1), train.measured[:, [0, 1]].all(1)
    real, guess = (test.features["P", name][stained[0]] for name in ("real", "linear"))
    of = train.features["P", "real"][stained[1]]
    x, y = (np.clip((v - of.mean(0)) / of.std(0), -CLIP, CLIP) for v in (real, guess))
    table, _ = realism(test, [train], PANEL, test.obs["group"])
    found = table.query("prediction == 'linear'")["value"].item()
    assert found == pytest.approx(paired_distance(np.zeros(len(x)), x, y)(ONE)[0])
    blind = Part(train.cells, train.obs, train.measured)  # of several imputers, one of which never saw the stain
    again, _ = realism(test, [train, blind, train], PANEL, test.obs["group"])
    pd.testing.assert_frame_equal(table, again)


def test_without_features_or_training_cells_nothing_is_told(parts):
    train, test = parts
    bare = Part(test.cells, test.obs, test.measured)
    for args in ((bare, [train]), (test, []), (test, [Part(train.cells, train.obs, train.measured)])):
        table, by_group = realism(*args, PANEL, test.obs["group"])
        assert table.empty
        assert by_group.empty
