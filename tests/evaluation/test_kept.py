"""What was looked at is not looked at again, unless something that it depends on has changed."""

import io
import shutil

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from imgshared import api
from imgshared.data.store import CellStore
from imgshared.evaluation import study
from imgshared.prediction import load_run

QUIET = Console(file=io.StringIO())


@pytest.fixture
def looked(monkeypatch):
    """Counts the parts that are collected."""
    count = []
    collect = study.collect

    def counted(*args, **wishes):
        count.append(wishes)
        return collect(*args, **wishes)

    monkeypatch.setattr(study, "collect", counted)
    return count


def test_another_label_is_judged_without_looking_again_and_as_if_it_had_been(trained_run, toy, tmp_path, looked):
    first = api.evaluate(trained_run, toy, tmp_path / "out", labels=["label"], train_on="train")
    assert len(looked) == 2
    toy = CellStore(toy.path)
    toy.obs["arm"] = np.where(np.arange(len(toy)) % 2, "a", "b")
    wish = {"labels": ["arm", "label"], "factors": ["size"], "train_on": "train"}
    again = api.evaluate(trained_run, toy, tmp_path / "out", **wish)
    assert len(looked) == 2
    fresh = api.evaluate(trained_run, toy, tmp_path / "fresh", **wish)
    assert len(looked) == 4
    assert again.metrics == fresh.metrics
    for name in ("cells", "features", "effects", "latent_maps", "contradictions", "pictures"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(fresh, name))
    assert first.metrics["fidelity"] == again.metrics["fidelity"]


def test_what_it_depends_on_is_looked_at_again(trained_run, toy, tmp_path, looked):
    run = load_run(shutil.copytree(trained_run.path, tmp_path / "run"))
    out = tmp_path / "out"
    api.evaluate(run, toy, out)
    api.evaluate(run, toy, out)
    assert len(looked) == 2
    api.evaluate(run, toy, out, seed=1)
    assert len(looked) == 4
    assert len(list((out / "cache").glob("look_*.npz"))) == 2  # the others are of no use any more
    cut = next((out / "cache").glob("look_*_test.npz"))
    cut.write_bytes(cut.read_bytes()[:1000])
    api.evaluate(run, toy, out, seed=1)
    assert len(looked) == 6
    other = load_run(run.path, checkpoint="last")
    api.evaluate(other, toy, out, seed=1)
    assert len(looked) == 8
    fewer = CellStore(toy.path)
    fewer.measured[np.flatnonzero(fewer.measured[:, 2])[-2:], 2] = False  # out of focus, say
    api.evaluate(other, fewer, out, seed=1)
    assert len(looked) == 10


def test_an_interrupted_nested_study_keeps_the_folds_it_has_looked_at(tiny, toy, tmp_path, looked, monkeypatch):
    run = api.train(tiny, out=tmp_path / "run", console=QUIET)
    wish = {"refit": True, "folds": 2}
    with monkeypatch.context() as patch:
        collect = study.collect

        def interrupted(*args, **wishes):
            if len(looked) == 2:
                raise KeyboardInterrupt
            return collect(*args, **wishes)

        patch.setattr(study, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            api.evaluate(run, toy, tmp_path / "out", **wish)
    found = api.evaluate(run, toy, tmp_path / "out", **wish)
    assert len(looked) == 4
    assert len(found.metrics["splits"]) == 2
