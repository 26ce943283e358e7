"""The nested study: nothing of a group is seen before it is judged; folds resume, and run one a process."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from imgshared import api
from imgshared.config import EvaluateConfig, validate
from imgshared.data.normalise import fit_normaliser
from imgshared.data.store import CellStore
from imgshared.evaluation.refit import plan_folds
from imgshared.prediction import load_run, predict_cells
from imgshared.types import InputError

WISH = {"refit": True, "folds": 2, "labels": ["label"]}
CONFIG = validate(EvaluateConfig, WISH, "test")


@pytest.fixture(scope="module")
def linear(tiny, toy, tmp_path_factory):
    """A linear run on the toy store."""
    plan = dataclasses.replace(
        tiny, method=validate(type(tiny), {"data": "x", "method": {"name": "linear"}}, "t").method
    )
    return api.train(plan, out=tmp_path_factory.mktemp("linear") / "run", console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def nested(linear, toy):
    return api.evaluate(linear, toy, **WISH)


def test_every_group_is_judged_by_a_model_that_never_saw_it(nested, linear, toy):
    splits = nested.metrics["splits"]
    assert sorted(v for s in splits for v in s["test"]) == ["g0", "g1", "g2", "g3", "g4"]
    for split in splits:
        assert split["val"]
        parts = [set(split[p]) for p in ("train", "val", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 5
    assert nested.metrics["cells_used"]["test"] == len(toy)
    assert nested.leaks == []
    assert set(nested.cells["group"]) == {"g0", "g1", "g2", "g3", "g4"}
    assert nested.report.parent == linear.path / "evaluation" / "cells_refit"
    page = nested.report.read_text()
    assert "fold 2, val" in page
    assert "Each of 2 folds holds groups out" in page
    assert nested.probes.empty
    least = min(int(toy.obs["group"].isin(split["train"]).sum()) for split in splits)
    assert nested.imputability.set_index("marker")["trained"]["P1"] == least


def test_each_fold_has_a_normaliser_of_its_own_training_groups(nested, toy):
    for k, split in enumerate(nested.metrics["splits"], 1):
        run = load_run(nested.report.parent / "folds" / f"fold_{k}")
        cells = np.flatnonzero(toy.obs["group"].isin(split["train"]))
        assert run.normaliser == fit_normaliser(toy, cells, [0, 1, 2])


def test_scores_are_those_of_the_folds_own_models(nested, toy):
    """Each cell's L1 is that of its fold's model, computed apart."""
    for k, split in enumerate(nested.metrics["splits"], 1):
        run = load_run(nested.report.parent / "folds" / f"fold_{k}")
        cells = np.flatnonzero(toy.obs["group"].isin(split["test"]))
        done = predict_cells(run, toy, cells, full=False, shared=False)
        gap = np.abs(done.real - done.images["predicted"])[:, 1].mean((1, 2))
        table = nested.cells.query("marker == 'P1'").set_index("cell_id")["l1"]
        np.testing.assert_allclose(table.loc[toy.obs.index[cells]], gap, rtol=1e-5)


def test_what_is_trained_is_not_trained_again(nested, linear, toy):
    weights = nested.report.parent / "folds" / "fold_1" / "checkpoints" / "best.safetensors"
    before = weights.stat().st_mtime_ns
    again = api.evaluate(linear, toy, **WISH)
    assert weights.stat().st_mtime_ns == before
    assert json.loads((again.report.parent / "metrics.json").read_text()) == nested.metrics


def test_folds_run_one_a_process(linear, toy, tmp_path, nested):
    api.refit(linear, toy, tmp_path / "out", fold=2, config=CONFIG)
    assert sorted(p.name for p in (tmp_path / "out" / "folds").iterdir()) == ["fold_2"]
    found = api.evaluate(linear, toy, tmp_path / "out", config=CONFIG)
    assert found.metrics == nested.metrics
    with pytest.raises(InputError, match="no fold 3"):
        api.refit(linear, toy, tmp_path / "out", fold=3, config=CONFIG)


def test_folds_of_another_plan_are_refused(linear, toy, nested):
    with pytest.raises(InputError, match="was trained for other folds"):
        api.evaluate(linear, toy, **(WISH | {"folds": 3, "seed": 7}))
    method = dataclasses.replace(linear.experiment.method, ridge=0.1)
    other = dataclasses.replace(linear, experiment=dataclasses.replace(linear.experiment, method=method))
    with pytest.raises(InputError, match="was trained with other settings"):
        api.evaluate(other, toy, **WISH)
    data = shutil.copytree(toy.path, linear.path / "moved.zarr")
    moved = CellStore(data)
    moved.info["data_hash"] = "another"
    contract = dataclasses.replace(linear.contract, data_hash="another")
    with pytest.raises(InputError, match="was trained on other cells"):
        api.evaluate(dataclasses.replace(linear, contract=contract), moved, nested.report.parent, **WISH)


def test_a_donor_on_both_sides_is_refused_before_any_training(linear, arrays, write_store, tmp_path):
    images, measured, masks, obs = arrays
    obs["donor"] = "d1"
    store = CellStore(write_store(tmp_path / "cells.zarr", images, measured, masks, obs))
    run = dataclasses.replace(linear, contract=dataclasses.replace(linear.contract, data_hash=store.data_hash))
    with pytest.raises(InputError, match="donor 'd1' has cells on both sides"):
        plan_folds(run, store, dataclasses.replace(CONFIG, group="donor"))


def test_a_fold_that_was_cut_short_goes_on(linear, toy, nested, tmp_path):
    """Its checkpoint is there, the mark of its end is not: it is trained on, not anew, and judged as ever."""
    out = tmp_path / "out"
    shutil.copytree(nested.report.parent / "folds" / "fold_1", out / "folds" / "fold_1")
    (out / "folds" / "fold_1" / "done").unlink()
    found = api.evaluate(linear, toy, out, config=CONFIG)
    assert found.metrics == nested.metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 6}, "6 folds need 6 values of 'group', there are 5"),
        ({"allow_seen_groups": True}, "never saw it anyway"),
        ({"train_on": "test"}, "train_on=test: classifiers of a nested study learn from what taught"),
        ({"labels": ["lebel"]}, "Did you mean 'label'"),
    ],
)
def test_bad_wishes_are_refused_before_any_training(linear, toy, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        api.evaluate(linear, toy, tmp_path / "out", **(WISH | change))
    assert not (tmp_path / "out").exists()


def test_a_label_that_is_the_group_has_no_honest_split(linear, arrays, write_store, tmp_path):
    images, measured, masks, obs = arrays
    obs["label"] = np.where(obs["group"] == "g2", "treated", "control")
    store = CellStore(write_store(tmp_path / "cells.zarr", images, measured, masks, obs))
    run = dataclasses.replace(linear, contract=dataclasses.replace(linear.contract, data_hash=store.data_hash))
    with pytest.raises(InputError, match="no honest split exists"):
        plan_folds(run, store, CONFIG)


def test_a_stain_that_a_fold_could_not_learn_is_refused_before_any_training(linear, arrays, write_store, tmp_path):
    images, measured, masks, obs = arrays
    measured[:, 2] = (obs["group"] == "g2").to_numpy()
    store = CellStore(write_store(tmp_path / "cells.zarr", images, measured, masks, obs))
    run = dataclasses.replace(linear, contract=dataclasses.replace(linear.contract, data_hash=store.data_hash))
    with pytest.raises(InputError, match=r"P2 is measured in no training group of fold \d"):
        plan_folds(run, store, CONFIG)


def test_another_store_cannot_be_refitted(linear, make_store, tmp_path):
    other = CellStore(make_store(tmp_path / "other.zarr", seed=9))
    with pytest.raises(InputError, match="needs the store that trained it"):
        plan_folds(linear, other, CONFIG)


def test_each_fold_is_calibrated_on_its_own_inner_groups(nested, toy):
    assert set(nested.coverage["marker"]) == {"P1", "P2"}
    assert set(nested.cells.loc[nested.cells["width"].notna(), "group"]) == {"g0", "g1", "g2", "g3", "g4"}
    for k in (1, 2):
        assert (nested.report.parent / "folds" / f"fold_{k}" / "trust.npz").exists()


def test_two_processes_train_a_fold_each_and_one_judges(nested, linear, toy, in_two_processes, tmp_path):
    wish = ("folds=2", "labels=[label]", "--refit", "--out", tmp_path / "out")
    said = in_two_processes("evaluate", linear.path, toy.path, *wish)
    assert said.count("report.html") == 1
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for key in ("splits", "cells_used", "leaks"):
        assert found[key] == nested.metrics[key]
    theirs, ours = (pd.read_csv(out / "tables" / "labels.csv") for out in (tmp_path / "out", nested.report.parent))
    pd.testing.assert_frame_equal(theirs, ours)


def test_one_fold_is_not_for_several_processes(linear, toy, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="under torchrun leave it out"):
        api.refit(linear, toy, tmp_path / "out", fold=1, config=CONFIG)
