import json

import numpy as np
import pandas as pd
import pytest

from imgshared.data.split import Split, make_split
from imgshared.types import InputError


def cells(groups=20, each=7, labels=2):
    group = np.repeat(np.arange(groups), each)
    return pd.DataFrame(
        {
            "group": pd.Categorical([f"g{g:02d}" for g in group]),
            "label": [f"label{g % labels}" for g in group],
            "plate": [f"p{g // 4}" for g in group],
            "well": np.arange(len(group)) % 5,
        }
    )


@pytest.mark.parametrize("stratify", [None, "label"])
def test_no_group_is_ever_in_two_parts_and_none_is_lost(stratify):
    obs = cells()
    for seed in range(50):
        split = make_split(obs, stratify=stratify, seed=seed)
        parts = pd.Series(split.assign(obs)).groupby(obs["group"].astype(str)).agg(set)
        assert all(len(p) == 1 for p in parts)
        assert sorted(split.train + split.val + split.test) == sorted(obs["group"].unique())
        assert len(split.test) == 4
        assert len(split.val) in (3, 4)  # a stratum's share is rounded


def test_a_split_is_a_function_of_its_seed_not_of_the_order_of_cells():
    obs = cells()
    assert make_split(obs, seed=3) == make_split(obs.sample(frac=1, random_state=0), seed=3)
    assert len({make_split(obs, seed=s) for s in range(20)}) > 15


def test_fractions_of_nothing_and_lists():
    obs = cells()
    assert make_split(obs, val=0.0, test=0.0).train == tuple(f"g{g:02d}" for g in range(20))
    split = make_split(obs, val=["g03"], test=["g00", "g19"])
    assert (split.val, split.test, len(split.train)) == (("g03",), ("g00", "g19"), 17)
    mixed = make_split(obs, val=0.1, test=["g00", "g19"])
    assert mixed.test == ("g00", "g19")
    assert len(mixed.val) == 2
    assert not {"g00", "g19"} & {*mixed.val, *mixed.train}


def test_few_groups_still_give_each_part_one():
    split = make_split(cells(groups=3))
    assert (len(split.train), len(split.val), len(split.test)) == (1, 1, 1)


@pytest.mark.parametrize("seed", range(10))
def test_stratified_parts_hold_every_stratum_in_proportion(seed):
    obs = cells(groups=20, labels=4)
    split = make_split(obs, stratify="label", val=0.2, test=0.2, seed=seed)
    for part in ("train", "val", "test"):
        assert obs["label"][split.assign(obs) == part].nunique() == 4


@pytest.mark.parametrize("seed", range(10))
def test_stratification_never_takes_a_whole_stratum_from_training(seed):
    obs = cells(groups=9)
    obs["label"] = np.where(obs["group"] == "g08", "rare", "common")
    split = make_split(obs, stratify="label", val=0.3, test=0.4, seed=seed)
    assert "g08" in split.train


def test_stratification_that_leaves_a_part_empty_is_refused():
    obs = cells(groups=4, labels=4)
    with pytest.raises(InputError, match="no group can go to test, every label has only one left"):
        make_split(obs, stratify="label")


def test_cells_of_one_group_on_both_sides_are_refused_by_name():
    obs = cells()
    with pytest.raises(InputError, match=r"group 'g00' has cells on both sides when splitting by 'well' \(20 groups"):
        make_split(obs, by="well", val=["1"], test=["2"])
    split = make_split(obs, by="plate", val=["p1"], test=["p2"])  # whole groups: fine
    assert set(obs["group"][split.assign(obs) == "test"]) == {"g08", "g09", "g10", "g11"}


def test_numbers_are_compared_as_text():
    obs = cells().drop(columns="group")
    split = make_split(obs, by="well", val=["1"], test=["2"])
    assert split.train == ("0", "3", "4")
    assert set(obs["well"][split.assign(obs) == "val"]) == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "grop"}, "no column 'grop' among group, label, plate, well. Did you mean 'group'?"),
        ({"stratify": "labl"}, "no column 'labl' among .* Did you mean 'label'?"),
        ({"test": ["g0x"]}, "no group 'g0x' in the store. Did you mean 'g10'?"),
        ({"val": ["g01"], "test": ["g01", "g02"]}, "group g01 is in both val and test"),
        (
            {"by": "plate", "val": ["p0", "p1"], "test": ["p2", "p3", "p4"]},
            r"no plate is left to train on \(5 in all\)",
        ),
    ],
)
def test_what_cannot_be_split_is_named(arguments, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        make_split(cells(), **arguments)


def test_values_that_the_split_does_not_know_belong_to_no_part():
    split = Split("group", ("g00",), ("g01",), ("g02",))
    assert list(split.assign(cells(groups=4, each=1))) == ["train", "val", "test", "none"]
    assert Split.from_dict(json.loads(json.dumps(split.to_dict()))) == split
