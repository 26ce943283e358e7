"""Bad labels are refused by name; groups are never on both sides."""

import numpy as np
import pandas as pd
import pytest

from imgshared.evaluation.labels import (
    check_values,
    grouped_folds,
    inner_groups,
    read_factor,
    read_label,
    refuse_broken_folds,
    refuse_shared_groups,
    refuse_untaught,
)
from imgshared.types import InputError

obs = pd.DataFrame(
    {
        "group": [f"g{i % 6}" for i in range(60)],
        "drug": [["a", "b", None, "c"][i % 4] for i in range(60)],
        "one": "same",
        "half": [f"h{i % 2}" for i in range(60)],
        "words": "text",
    }
)


def test_missing_and_unwanted_values_are_counted():
    label = read_label(obs, "drug", ("a", "b"))
    assert label.classes == ("a", "b")
    assert (label.missing, label.other) == (15, 15)
    assert (label.codes >= 0).sum() == 30


def test_a_class_called_none_is_no_missing_value():
    label = read_label(obs.assign(drug=obs["drug"].replace("a", "None")), "drug")
    assert label.classes == ("None", "b", "c")
    assert label.missing == 15


def test_unknown_label_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'drug'"):
        read_label(obs, "drugs")


def test_one_class_is_named():
    with pytest.raises(InputError, match=r"'one' has one class \(same\)"):
        read_label(obs, "one")


def test_unknown_value_and_text_factor_are_refused():
    with pytest.raises(InputError, match="'z'"):
        check_values(obs, ("drug",), ("z",))
    with pytest.raises(InputError, match="'words' holds no numbers"):
        read_factor(obs, "words")


def test_no_group_is_on_both_sides_of_a_fold():
    label = read_label(obs, "drug", ("a", "b", "c"))
    cells, groups = np.flatnonzero(label.codes >= 0), obs["group"].to_numpy()
    pairs = grouped_folds(label, cells, groups, "group", 3, 0)
    assert all(not set(groups[a]) & set(groups[b]) for a, b in pairs)
    assert sorted(np.concatenate([b for _, b in pairs])) == sorted(cells)


def test_fewer_groups_than_folds():
    label = read_label(obs, "drug", ("a", "b"))
    with pytest.raises(InputError, match=r"7 folds need 7 values of 'group'.*there are 6"):
        grouped_folds(label, np.flatnonzero(label.codes >= 0), obs["group"].to_numpy(), "group", 7, 0)


def test_a_class_that_only_one_group_has():
    lonely = obs.assign(drug=np.where(obs["group"] == "g1", "a", "b"))
    label = read_label(lonely, "drug")
    with pytest.raises(InputError, match=r"class 'a' is of group 'g1'.*no honest split exists"):
        grouped_folds(label, np.arange(60), obs["group"].to_numpy(), "group", 3, 0)


def test_a_class_that_no_training_group_has():
    label = read_label(obs.assign(drug=obs["group"]), "drug")
    with pytest.raises(InputError, match=r"class 'g5' is in no training group.*no honest split exists"):
        refuse_untaught(label, obs.assign(drug=obs["group"])[obs["group"] != "g5"])
    refuse_untaught(label, obs.assign(drug=obs["group"]))


def test_groups_on_both_sides_are_named():
    with pytest.raises(InputError, match="group 'g0' has cells on both sides"):
        refuse_shared_groups(obs[:30], obs[30:], "group")
    refuse_broken_folds(obs, "group", "half")
    with pytest.raises(InputError, match="half 'h0' has cells in several values of 'group'"):
        refuse_broken_folds(obs, "half", "group")


def test_inner_groups_are_whole_and_hold_every_class():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 10, 500)
    codes = rng.integers(0, 3, 500)
    kept = inner_groups(codes, groups, seed=0)
    assert not set(groups[kept]) & set(groups[~kept])
    assert set(codes[kept]) == set(codes[~kept]) == {0, 1, 2}
    assert 0.1 < kept.mean() < 0.3


@pytest.mark.parametrize(
    ("codes", "groups"),
    [([0, 1] * 20, [0] * 40), ([0] * 20 + [1] * 20, [0] * 20 + [1] * 20), ([0] * 39 + [1], list(range(8)) * 5)],
)
def test_no_inner_groups_where_a_class_would_be_lost(codes, groups):
    assert inner_groups(np.array(codes), np.array(groups), seed=0) is None
