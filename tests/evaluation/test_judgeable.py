"""Cells that were never stained together: those that show both sides are judged, the others are counted."""

import io
from dataclasses import replace

import numpy as np
import pytest
import yaml
from rich.console import Console

from imgshared import api
from imgshared.config import EvaluateConfig, Experiment, RegressionConfig, dump, validate
from imgshared.data.store import CellStore
from imgshared.evaluation.calibrate import calibrate
from imgshared.evaluation.imputability import FILE, assess, warnings_of
from imgshared.evaluation.judgeable import judgeable, sampled, seen, unpaired, with_sources
from imgshared.evaluation.refit import plan_folds
from imgshared.prediction.trust import load_trust
from imgshared.types import InputError

HELD = np.arange(64, 80)  # group g4
ODD = np.arange(80) % 2 == 1


@pytest.fixture(scope="module")
def write_apart(make_store, write_store):
    """``write_apart(path, both)``: DNA in even, P1 and P2 in odd cells; `both` show all three."""

    def write(path, both=()):
        toy = CellStore(make_store(path.with_suffix(".whole")))
        measured = np.stack([~ODD, ODD, ODD], 1)
        measured[list(both)] = True
        images = toy.images(slice(None))
        images[:, 2] = images[:, 1] // 2 + 50  # the toy lacks it in some
        crops = images * measured[..., None, None].astype(images.dtype)
        return CellStore(write_store(path, crops, measured, toy.masks().astype(np.uint8), toy.obs))

    return write


@pytest.fixture(scope="module")
def apart(write_apart, tmp_path_factory):
    """No cell shows both."""
    return write_apart(tmp_path_factory.mktemp("apart") / "cells.zarr")


@pytest.fixture(scope="module")
def some(write_apart, tmp_path_factory):
    """No training cell shows both; four do of the validation group g3, and eight of the held-out g4."""
    return write_apart(tmp_path_factory.mktemp("some") / "cells.zarr", (*range(48, 52), *HELD[:8]))


@pytest.fixture(scope="module")
def translated(tiny, some, tmp_path_factory):
    """translator on cells that were never stained together."""
    weights = {"cross": 0, "adversarial": 0.1, "patch_nce": 0.1, "cycle": 1.0}
    method = {"name": "translator", "channels": [4, 6], "marker_dim": 3, "epochs": 1, "translated": None,
              "weights": weights, "discriminator_channels": [4], "discriminator_sees_source": False}  # fmt: skip
    plan = yaml.safe_load(dump(tiny)) | {"data": str(some.path), "method": method}
    plan["train"] |= {"balance": "panels"}
    out = tmp_path_factory.mktemp("translated") / "run"
    return api.train(validate(Experiment, plan, "t"), out=out, console=Console(file=io.StringIO()))


def test_held_out_cells_that_show_both_are_judged_and_the_others_counted(translated, some, tmp_path):
    found = api.evaluate(translated, some, tmp_path / "out")
    assert set(found.fidelity["cells"]) == {8}
    assert found.metrics["cells"] == {"train": 24, "test": 8}
    assert found.metrics["cells_used"] == {"train": 24, "test": 8}
    assert "Not judged of 16 held-out cells: 4 do not show DNA, 4 show no protein to judge" in found.notes
    assert "a random sample" not in (tmp_path / "out" / "model_card.md").read_text()
    some_only = api.evaluate(translated, some, tmp_path / "few", max_cells=4)  # none is wasted on cells without
    assert set(some_only.fidelity["cells"]) == {4}


def test_floors_know_the_mean_picture_of_what_no_training_cell_shows_beside_the_source(translated, some, tmp_path):
    found = api.evaluate(translated, some, tmp_path / "out")
    assert set(found.fidelity["prediction"]) >= {"linear", "marker_mean"}
    assert found.checks["value"].notna().any()
    assert (
        "No training cell that was looked at shows P1, P2 beside DNA: the linear floor is the mean picture there"
        in found.notes
    )
    crops = [images[measured[:, 1], 1] for images, measured in unpaired(translated, some, 100)]
    rows = np.flatnonzero(ODD[:48])
    raw, norm = some.images(rows)[:, 1], translated.normaliser
    expected = (raw - norm.low[1]) / (norm.high[1] - norm.low[1])
    np.testing.assert_allclose(np.concatenate(crops), expected, rtol=1e-4, atol=1e-4)
    assert sum(len(images) for images, _ in unpaired(translated, some, 7)) == 7


def test_calibrated_on_the_validation_cells_that_show_both(translated, some, tmp_path):
    run = replace(translated, path=tmp_path)
    calibrate(run, some)
    trust = load_trust(run.path)
    assert (trust.pixel_half[1:] > 0).all()
    assert assess(run, some)
    assert not any("no validation cell" in said for said in warnings_of(run, ["P1", "P2"]))


def test_without_such_validation_cells_nothing_is_vouched_for_and_that_is_told(trained_run, apart, tmp_path):
    run = replace(trained_run, path=tmp_path)
    calibrate(run, apart)
    assert np.isnan(load_trust(run.path).pixel_half).all()
    assess(run, apart)
    said = warnings_of(run, ["DNA", "P1"])
    whole = (run.path / FILE).read_text()
    (run.path / FILE).write_text(whole[:-3])
    with pytest.raises(InputError, match=rf"{FILE} is damaged .*: remove it, and train --resume makes it again"):
        warnings_of(run, ["P1"])
    assert len(said) == 1
    assert said[0].startswith("P1: no validation cell shows it beside DNA, so how far predictions from there")


def test_why_nothing_can_be_judged_is_told(trained_run, apart, tmp_path, arrays, write_store):
    why = (
        r"P1 is measured in 8, P2 in 8 of 16 held-out cells, none of which shows DNA, from which it is predicted: "
        r"nothing to judge\. Give a store with"
    )
    with pytest.raises(InputError, match=why):
        api.evaluate(trained_run, apart, tmp_path / "out")
    images, measured, masks, obs = arrays
    measured[HELD, 1:] = False
    bare = CellStore(write_store(tmp_path / "bare.zarr", images, measured, masks, obs))
    with pytest.raises(InputError, match="no protein of the model is measured in any held-out cell: nothing to judge"):
        api.evaluate(trained_run, bare, tmp_path / "out")
    measured[:48, 0] = False
    untaught = CellStore(write_store(tmp_path / "untaught.zarr", images + 1, measured, masks, obs))  # another store
    with pytest.raises(InputError, match="none of the 48 training cells shows what the model predicts from"):
        api.evaluate(trained_run, untaught, tmp_path / "out")


def test_a_method_with_other_sources_needs_these_and_chromatin(untrained, some):
    run = untrained(RegressionConfig(channels=(4, 8), sources=("P1",)))
    every, rows = np.arange(80), [*range(48, 52), *HELD[:8]]
    assert with_sources(run, some, every).tolist() == rows
    assert judgeable(run, some, every)[0].tolist() == rows
    assert judgeable(run, some, every)[1:] == (68, 0)
    with pytest.raises(InputError, match=r"P2 is measured in 8 of 16 held-out cells, none of which shows P1.*and DNA"):
        judgeable(run, CellStore(some.path), np.arange(32, 48))
    assert sampled(run, some, seen(run, some), 3)[1].tolist() == sorted(sampled(run, some, seen(run, some), 3)[1])
    assert len(sampled(run, some, seen(run, some), 3)[1]) == 3


def test_a_fold_with_nothing_to_judge_is_refused_before_it_is_trained(translated, some):
    with pytest.raises(InputError, match=r"fold \d of \d+ cells: .*none of which shows DNA.*Or use fewer folds"):
        plan_folds(translated, some, EvaluateConfig(folds=5))


def test_stored_predictions_need_not_hold_cells_that_could_not_be_predicted(translated, some, tmp_path):
    with pytest.warns(UserWarning, match="are left out"):
        given = api.predict(translated, some, tmp_path / "p.zarr")
    own = api.evaluate(translated, some, tmp_path / "own")
    read = api.evaluate(translated, some, tmp_path / "read", predictions=str(given))
    np.testing.assert_allclose(read.stains["predicted"], own.stains["predicted"], atol=1e-3)
    with pytest.warns(UserWarning, match="do not show P1"):
        other = api.predict(translated, some, tmp_path / "q.zarr", sources=["P1"], markers=["P2"])
    found = api.evaluate(translated, some, tmp_path / "other", predictions=str(other))
    assert set(found.fidelity["cells"]) == {8}
    assert set(found.fidelity["marker"]) == {"P2"}
