"""Networks as classifiers, from the crops that are kept to the scores of the whole matrix."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from imgshared.config import EvaluateConfig
from imgshared.evaluation import cnn, controls
from imgshared.evaluation.cnn import Training
from imgshared.evaluation.collect import BLOCK, collect
from imgshared.evaluation.evaluate import evaluate
from imgshared.evaluation.floors import Floors
from imgshared.evaluation.matrix import MATRIX, name_of
from imgshared.evaluation.study import Look, Study


def test_the_crops_kept_are_the_pictures_that_are_judged(world, run):
    cells = np.random.default_rng(0).permutation(len(world.obs))[: BLOCK + 40]
    store = SimpleNamespace(obs=world.obs)
    floors = Floors(3, [0])
    part = collect(partial(world.predict, run, store), store, run.panel, cells, fit=floors, crops=True)
    assert set(part.crops) == {("DNA", "chromatin")} | {
        (marker, given)
        for marker in ("Rim", "Foci")
        for given in ("real", "predicted", "full", "shared", "marker mean")
    }
    rim = {"real": world.real, "predicted": world.predicted, "full": world.full, "shared": world.shared_only}
    for given, images in rim.items():
        np.testing.assert_array_equal(part.crops["Rim", given], images[cells, 1].astype(np.float16))
    np.testing.assert_array_equal(part.crops["DNA", "chromatin"], world.real[cells, 0].astype(np.float16))
    for marker in ("Rim", "Foci"):
        constant = part.crops[marker, "marker mean"]
        np.testing.assert_array_equal(constant, np.broadcast_to(constant[:1], constant.shape))
    np.testing.assert_allclose(constant[0], floors.marker_mean(2), atol=1e-3)


def test_cells_to_show_are_drawn_by_the_imputer_that_never_saw_them_with_its_own_intervals():
    def imputer(cells, factor, trust):
        def make(rows, **_):
            real = np.broadcast_to(rows[:, None, None, None], (len(rows), 2, 4, 4)).astype(np.float32)
            return SimpleNamespace(real=real, images={"predicted": real * factor})

        return Look(None, None, None, SimpleNamespace(cells=np.array(cells)), make, trust)

    trust = SimpleNamespace(pixels=lambda done, c: done.images["predicted"][:, c] + c)
    looks = [imputer([7, 8], 10, trust), imputer([1, 2, 3], 100, None)]
    test = SimpleNamespace(cells=np.array([7, 8, 1, 2, 3]))
    done = Study(None, EvaluateConfig(), looks, test).pictures([4, 1, 2, 0])
    assert done.real[:, 0, 0, 0].tolist() == [3, 8, 1, 7]
    assert done.predicted[:, 1, 0, 0].tolist() == [300, 80, 100, 70]
    np.testing.assert_array_equal(done.uncertainty[:, :, 3, 3], [[np.nan] * 2, [80, 81], [np.nan] * 2, [70, 71]])


@pytest.fixture
def quick(monkeypatch):
    """Networks that are trained for three steps of eight cells, and one permutation of the labels."""
    monkeypatch.setattr(cnn, "Training", lambda model, steps, seed: Training(model, 3, seed))
    monkeypatch.setattr(cnn, "BATCH", 8)
    monkeypatch.setattr(controls, "COUNT", {"features": 1, "cnn": 1})


@pytest.mark.parametrize("train_on", ["train", "test"])
def test_networks_answer_the_whole_matrix_beside_linear_classifiers(quick, world, run, tmp_path, train_on):
    few = type(world)(n=240)
    few.measured[:, 2] = False  # Rim alone
    config = EvaluateConfig(
        labels=("drug",), classifiers=("features", "cnn"), cnn="test_resnet", folds=2, train_on=train_on
    )
    found = evaluate(run, few.store(tmp_path / "cells.zarr"), tmp_path / "out", config, predict=few.predict)
    assert found.notes[-1].startswith("drug from Foci: left out")
    auroc = found.classifiers.query("score == 'auroc'")
    for backend in ("features", "cnn"):
        values = auroc[auroc["backend"] == backend].set_index("input")["value"]
        assert set(values.index) == {name_of(learn, tested) for learn, tests in MATRIX.items() for tested in tests}
        assert np.isfinite(values).all()
    for table in (found.contrasts, found.agreement, found.controls, found.labels, found.probabilities):
        assert set(table["backend"]) == {"features", "cnn"}
    assert all(f"drug, {backend}" in found.report.read_text() for backend in ("features", "cnn"))
