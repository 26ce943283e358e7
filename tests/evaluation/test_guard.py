"""Planted leaks are refused, or stamped on every page; and what is stamped differs from the honest number."""

import copy
import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tifffile
from rich.console import Console

from imgshared import api
from imgshared.config import EvaluateConfig, Experiment, validate
from imgshared.data.normalise import fit_normaliser
from imgshared.data.split import Split
from imgshared.data.store import CellStore
from imgshared.evaluation.evaluate import evaluate
from imgshared.training import loop
from imgshared.types import InputError

CONFIG = EvaluateConfig()
QUIET = Console(file=io.StringIO())


@pytest.fixture
def store(world, tmp_path):
    return world.store(tmp_path / "cells.zarr")


def memory(world, run):
    """An imputer that has learnt its training cells by heart: it gives the stains of the one with the likest DNA."""
    train = np.flatnonzero(run.split.assign(world.obs) == "train")
    dna = world.real[:, 0].reshape(len(world.obs), -1)

    def predict(_run, _store, cells, **wishes):
        gap = ((dna[cells, None] - dna[None, train]) ** 2).sum(2) if len(cells) < 60 else None
        if gap is None:
            gap = (dna[cells] ** 2).sum(1)[:, None] - 2 * dna[cells] @ dna[train].T + (dna[train] ** 2).sum(1)
        done = world.predict(run, None, cells, **wishes)
        return dataclasses.replace(done, images=done.images | {"predicted": world.real[train[gap.argmin(1)]]})

    return predict


def pearson(found, marker="Rim"):
    table = found.fidelity.query("prediction == 'predicted' and score == 'pearson'").set_index("marker")
    return table.loc[marker, "value"]


def stamped(found):
    page = found.report.read_text()
    metrics = json.loads((found.report.parent / "metrics.json").read_text())
    said = 'class="every-page"' in page and metrics["cautions"] == found.cautions and metrics["leaks"] == found.leaks
    return said and ("Leaking: do not cite" in page) == bool(found.leaks) and bool(found.leaks or found.cautions)


def test_an_honest_evaluation_bears_no_stamp(world, run, store, tmp_path):
    found = evaluate(run, store, tmp_path / "out", CONFIG, predict=world.predict)
    assert found.leaks == found.cautions == []
    assert 'class="every-page"' not in found.report.read_text()


def test_an_imputer_that_saw_the_judged_donors(world, run, store, tmp_path):
    honest = evaluate(run, store, tmp_path / "honest", CONFIG, predict=memory(world, run))
    allowed = dataclasses.replace(CONFIG, allow_seen_groups=True)
    leaking = evaluate(run, store, tmp_path / "leaking", allowed, predict=memory(world, run))
    assert stamped(leaking)
    assert "8 of the 12 values of group" in leaking.leaks[0]
    assert pearson(leaking) > pearson(honest) + 0.03
    assert leaking.metrics["cells_used"]["test"] == len(store)

    run.split = Split("group", run.split.train, run.split.val + run.split.test, ())
    with pytest.raises(InputError, match="has seen every group"):
        evaluate(run, store, tmp_path / "out", CONFIG, predict=world.predict)


def test_one_donor_in_two_splits(world, run, tmp_path):
    """Split by image where donors have several: a label that is the donor's own is recognised, not learnt."""
    world = copy.copy(world)
    rng = np.random.default_rng(1)
    donors = rng.integers(0, 12, len(world.obs))
    place = [f"{d}_{i % 4}" for i, d in enumerate(donors)]
    about = {"image": place, "group": place, "donor": [f"donor{d:02d}" for d in donors]}
    arm = rng.permutation(12) % 2
    world.obs = world.obs.assign(**about, arm=np.where(arm[donors], "a", "b"))
    radius = np.hypot(*(np.indices((32, 32)) - 15.5)).astype(int).clip(0, 15)
    stain = rng.normal(0, 0.3, (12, 16)).astype(np.float32)  # how each donor's antibody falls off: nothing of its arm
    world.real = world.real + stain[donors][:, radius][:, None] * world.measured[..., None, None]
    store = world.store(tmp_path / "donors.zarr")
    by_image = sorted(set(world.obs["group"]))
    run.split = Split("group", tuple(by_image[::2]), (), tuple(by_image[1::2]))
    config = dataclasses.replace(CONFIG, labels=("arm",), train_on="train", group="donor")
    with pytest.raises(InputError, match="donor 'donor00' has cells on both sides"):
        evaluate(run, store, tmp_path / "out", config, predict=world.predict)

    def auroc(split, **change):
        run.split = split
        found = evaluate(
            run, store, tmp_path / "out", dataclasses.replace(config, **change), predict=world.predict
        ).classifiers
        return found.query("input == 'real' and score == 'auroc' and marker == 'Rim'")["value"].item()

    names = sorted(set(world.obs["donor"]))
    honest = auroc(Split("donor", tuple(names[:6]), (), tuple(names[6:])))
    blind = auroc(Split("group", tuple(by_image[::2]), (), tuple(by_image[1::2])), group="group")
    assert blind > honest + 0.15  # what the guard is told nothing of, it cannot see


def test_a_donor_whose_other_wells_trained_the_model_in_another_store(trained_run, toy, make_store, tmp_path):
    """By well the new store is unseen; its donors are those of the store that trained."""
    new = CellStore(make_store(tmp_path / "new.zarr", seed=5))
    new.obs["donor"] = new.obs["group"].astype(str)
    new.obs["group"] = ["n" + g for g in new.obs["donor"]]
    trained = CellStore(toy.path)
    trained.obs["donor"] = trained.obs["group"].astype(str)
    run = copy.copy(trained_run)
    object.__setattr__(run, "training_store", lambda why: trained)
    config = dataclasses.replace(CONFIG, group="donor")
    with pytest.raises(InputError, match="donor 'g0' has cells on both sides"):
        evaluate(run, new, tmp_path / "out", config)
    leaking = evaluate(run, new, tmp_path / "out", dataclasses.replace(config, allow_seen_groups=True))
    assert stamped(leaking)
    assert "donor 'g0' has cells on both sides of the run's split (4 in all)" in leaking.leaks[0]
    new.obs["donor"] = ["another " + d for d in new.obs["donor"]]
    honest = evaluate(run, new, tmp_path / "out", config)
    assert honest.leaks == honest.cautions == []
    del trained.obs["donor"]
    unknown = evaluate(run, new, tmp_path / "out", config)
    assert "has no column 'donor'" in unknown.cautions[0]


def test_training_cells_whose_groups_bear_other_names(trained_run, toy, write_store, tmp_path):
    """As a store that was prepared again from the same images, all of them or some, with another manifest."""
    renamed = toy.obs.assign(group=["donor " + g for g in toy.obs["group"]])
    part = np.arange(0, 80, 2)
    for name, rows in (("all", slice(None)), ("part", part)):
        obs = renamed.iloc[rows]
        path = write_store(tmp_path / f"{name}.zarr", toy.images()[rows], toy.measured[rows], toy.masks()[rows], obs)
        store = CellStore(path)
        with pytest.raises(InputError, match=r"cell0, of group 'donor g0', is a cell that the model has seen .* 'g0'"):
            evaluate(trained_run, store, tmp_path / "out", CONFIG)
    allowed = dataclasses.replace(CONFIG, allow_seen_groups=True)
    leaking = evaluate(trained_run, store, tmp_path / "out", allowed)
    assert stamped(leaking)
    assert "(32 judged cells bear names of such cells)" in leaking.leaks[0]


def test_intervals_over_parts_of_groups_are_said_to_be_too_narrow(trained_run, toy, tmp_path):
    store = CellStore(toy.path)
    store.obs["field"] = [f"{g}_{k % 2}" for k, g in enumerate(store.obs["group"].astype(str))]
    found = evaluate(trained_run, store, tmp_path / "out", dataclasses.replace(CONFIG, group="field"))
    assert found.cautions == [
        "intervals are over field, of which a group has up to 2: they are not independent of each other, so that "
        "intervals are too narrow; those over group are not"
    ]
    assert stamped(found)
    config = dataclasses.replace(CONFIG, group="field", labels=("label",), train_on="test", folds=2)
    with pytest.raises(InputError, match=r"group 'g4' has cells in several values of 'field'.*fold=group"):
        evaluate(trained_run, store, tmp_path / "out", config)


@pytest.mark.parametrize("where", ["train", "test"])
def test_what_a_leak_would_give_is_shown_with_labels_too(world, run, store, tmp_path, where):
    allowed = dataclasses.replace(
        CONFIG, labels=("drug",), factors=("size",), train_on=where, folds=4, allow_seen_groups=True
    )
    leaking = evaluate(run, store, tmp_path / "leaking", allowed, predict=memory(world, run))
    assert stamped(leaking)
    assert len(leaking.classifiers)
    assert len(leaking.probes)
    page = leaking.report.read_text() + (leaking.report.parent / "model_card.md").read_text()
    for untrue in ("unseen", "never saw", "not seen", "held-out cells of"):
        assert untrue not in page


def test_a_normaliser_that_was_fitted_on_all(tiny, arrays, write_store, tmp_path):
    """One held-out donor is stained three times as brightly: who has looked at it scales all others by it."""
    images, measured, masks, obs = arrays
    images = np.where((obs["group"] == "g4").to_numpy()[:, None, None, None], 3 * images, images).astype(images.dtype)
    store = CellStore(write_store(tmp_path / "cells.zarr", images, measured, masks, obs))
    run = api.train(dataclasses.replace(tiny, data=store.path), out=tmp_path / "run", console=QUIET)
    honest = evaluate(run, store, tmp_path / "honest", CONFIG)
    assert honest.leaks == []
    on_all = fit_normaliser(store, np.arange(len(store)), [0, 1, 2])
    assert on_all.high[0] > 2 * run.normaliser.high[0]
    leaked = train_with(dataclasses.replace(tiny, data=store.path), on_all, tmp_path / "leaked")
    leaking = evaluate(leaked, store, tmp_path / "leaking", CONFIG)
    assert stamped(leaking)
    assert "it was fitted on other cells" in leaking.leaks[0]
    r = [
        f.fidelity.query("score == 'pearson' and prediction == 'predicted'")["value"].mean() for f in (honest, leaking)
    ]
    assert abs(r[0] - r[1]) > 0.01  # a score without units


def train_with(experiment, normaliser, out):
    """Train with a normaliser that the loop would not have fitted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_normaliser", lambda *_: normaliser)
        return api.train(experiment, out=out, console=QUIET)


def test_images_that_were_scaled_one_by_one(tmp_path):
    images = api.simulate(tmp_path / "images", cells=120, donors=5, seed=3)
    table = pd.read_csv(images / "manifest.csv")
    found = {}
    for kind in ("camera", "scaled"):
        if kind == "scaled":
            for name in table["image"]:
                with tifffile.TiffFile(images / name) as file:
                    x, description = file.asarray().astype(np.float64), file.ome_metadata
                low, high = (f(x, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
                x = np.round(65535 * (x - low) / np.maximum(high - low, 1)).astype(np.uint16)
                tifffile.imwrite(images / name, x, description=description.encode(), metadata=None)
        done = api.prepare(images / "manifest.csv", tmp_path / f"{kind}.zarr", crop_px=32, qc=False)
        assert any("as if scaled one by one" in w for w in done.warnings) == (kind == "scaled")
        plan = {"data": str(done.path), "method": {"name": "linear"}, "split": {"test": 0.4, "val": 0.0}}
        run = api.train(validate(Experiment, plan, "linear"), out=tmp_path / kind, console=QUIET)
        found[kind] = evaluate(run, CellStore(done.path), tmp_path / f"{kind}_out", CONFIG)
    assert found["camera"].cautions == found["scaled"].leaks == []
    assert stamped(found["scaled"])
    assert "scaled one by one" in found["scaled"].cautions[0]
    r = {
        kind: f.fidelity.query("score == 'intensity_pearson' and prediction == 'predicted'")["value"].mean()
        for kind, f in found.items()
    }
    assert abs(r["camera"] - r["scaled"]) > 0.03


def test_groups_that_the_split_does_not_know_are_judged(trained_run, toy, make_store, tmp_path):
    path = make_store(tmp_path / "new.zarr", seed=5)
    new = CellStore(path)
    new.obs["group"] = ["n" + g for g in new.obs["group"].astype(str)]
    found = evaluate(trained_run, new, tmp_path / "out", CONFIG)
    assert found.metrics["cells_used"] == {"train": 48, "test": 80}  # the floors learn from the training store
    gone = dataclasses.replace(trained_run, experiment=dataclasses.replace(trained_run.experiment, data=tmp_path / "x"))
    with pytest.raises(InputError, match="is not there"):
        evaluate(gone, new, tmp_path / "out", CONFIG)
    changed = SimpleNamespace(**(vars(trained_run.contract) | {"data_hash": "another"}))
    with pytest.raises(InputError, match="has changed since"):
        evaluate(dataclasses.replace(trained_run, contract=changed), new, tmp_path / "out", CONFIG)
