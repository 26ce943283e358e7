"""Stored predictions are judged as the model's own; those of other cells, crops or markers are refused."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from imgshared import api
from imgshared.config import EvaluateConfig, validate
from imgshared.data.store import StoreWriter
from imgshared.evaluation.given import images_to_judge
from imgshared.prediction import predict_cells
from imgshared.types import InputError


@pytest.fixture(scope="module")
def predicted(trained_run, toy, tmp_path_factory):
    return api.predict(trained_run, toy, tmp_path_factory.mktemp("predicted") / "predicted.zarr")


def rewritten(path, source, change_ids=None, change=lambda images: images, **info):
    """The same predictions, in reverse order, with other ids or images."""
    import anndata

    given = anndata.read_zarr(source)
    order = np.arange(len(given))[::-1]
    obs = given.obs.iloc[order]
    if change_ids:
        obs = obs.rename(index=change_ids)
    with StoreWriter(path) as writer:
        writer.append(predicted_images=change(np.asarray(given.obsm["predicted_images"])[order]))
        writer.finish(
            obs, given.var, np.asarray(given.X)[order], layers={"measured": given.layers["measured"][order]},
            obsm={"spatial": given.obsm["spatial"][order]}, info={"crop_px": 16, "pixel_size_um": None, **info},
        )  # fmt: skip
    return path


def test_stored_predictions_are_judged_as_the_models_own(trained_run, toy, predicted, tmp_path):
    again = rewritten(tmp_path / "again.zarr", predicted)  # any order: cells are found by their ids
    own = api.evaluate(trained_run, toy, tmp_path / "own", labels=["label"])
    read = api.evaluate(trained_run, toy, tmp_path / "read", labels=["label"], predictions=str(again))
    for name in ("fidelity", "classifiers"):
        a, b = getattr(own, name), getattr(read, name)
        np.testing.assert_allclose(a["value"], b["value"], rtol=1e-3, atol=1e-3)
    assert any("were read from" in note for note in read.notes)
    assert read.coverage.empty  # nothing was calibrated for them


def test_what_is_judged_is_what_was_read(trained_run, toy, predicted, tmp_path):
    bright = rewritten(tmp_path / "bright.zarr", predicted, change=lambda images: images * 0 + 500)
    judge = images_to_judge(predict_cells, trained_run, toy, EvaluateConfig(predictions=str(bright)))
    cells = np.array([3, 50])
    done = judge(trained_run, toy, cells)
    assert np.ptp(done.images["predicted"][:, 1]) == 0
    np.testing.assert_array_equal(done.real, predict_cells(trained_run, toy, cells).real)


def test_predictions_of_other_cells_are_refused(trained_run, toy, predicted, tmp_path):
    other = rewritten(tmp_path / "other.zarr", predicted, change_ids={toy.obs.index[5]: "somebody else"})
    with pytest.raises(
        InputError, match=rf"does not belong to .*1 of 80 cells are not in it .first: {toy.obs.index[5]}"
    ):
        api.evaluate(trained_run, toy, tmp_path / "out", predictions=str(other))
    assert not (tmp_path / "out").exists()


def test_cells_that_have_changed_under_their_names_or_come_twice_are_refused(trained_run, toy, predicted, tmp_path):
    same = rewritten(tmp_path / "same.zarr", predicted, store_hash=toy.data_hash)
    images_to_judge(predict_cells, trained_run, toy, EvaluateConfig(predictions=str(same)))
    cut_anew = rewritten(tmp_path / "cut_anew.zarr", predicted, store_hash="of other crops")
    with pytest.raises(InputError, match=r"cut_anew.*was predicted from other cells than .* holds now"):
        api.evaluate(trained_run, toy, tmp_path / "out", predictions=str(cut_anew))
    twice = rewritten(tmp_path / "twice.zarr", predicted, change_ids={toy.obs.index[5]: toy.obs.index[6]})
    with pytest.raises(InputError, match=rf"holds the cell {toy.obs.index[6]} twice"):
        api.evaluate(trained_run, toy, tmp_path / "out", predictions=str(twice))


def test_a_store_without_the_images_is_refused(trained_run, toy, predicted, tmp_path):
    with pytest.raises(InputError, match="holds no predicted_images"):
        api.evaluate(trained_run, toy, tmp_path / "out", predictions=str(toy.path))
    with pytest.raises(InputError, match="holds no sharp_images"):
        api.evaluate(trained_run, toy, tmp_path / "out", predictions=str(predicted), sharp=True)


def test_a_nested_study_takes_no_predictions(trained_run, toy, predicted):
    with pytest.raises(InputError, match="a nested study predicts every group itself"):
        api.evaluate(trained_run, toy, refit=True, folds=2, predictions=str(predicted))


def test_the_sharp_output_is_judged_where_there_is_one(tiny, toy, trained_run, tmp_path):
    with pytest.raises(InputError, match="sharp"):
        api.evaluate(trained_run, toy, tmp_path / "none", sharp=True)
    plan = {
        "name": "translator",
        "channels": [4, 8],
        "epochs": 1,
        "weights": {"sharp": 0.3, "adversarial": 0.01},
        "discriminator_channels": [8],
    }
    settings = validate(type(tiny), {"data": "x", "method": plan}, "t").method
    run = api.train(
        dataclasses.replace(tiny, method=settings), out=tmp_path / "run", console=Console(file=io.StringIO())
    )
    mean, sharp = (api.evaluate(run, toy, tmp_path / name, sharp=name == "sharp") for name in ("mean", "sharp"))
    assert any("sharp output is judged" in note for note in sharp.notes)
    assert not np.allclose(mean.fidelity["value"], sharp.fidelity["value"])


def test_predictions_of_a_model_that_has_seen_the_judged_are_refused_or_stamped(
    tiny, trained_run, toy, predicted, tmp_path
):
    split = dataclasses.replace(tiny.split, val=("g0",), test=("g1",))
    other = api.train(
        dataclasses.replace(tiny, split=split), out=tmp_path / "other", console=Console(file=io.StringIO())
    )
    theirs = api.predict(other, toy, tmp_path / "theirs.zarr")
    with pytest.raises(InputError, match=r"was trained on 1 of the groups that are judged \(g4\)"):
        api.evaluate(trained_run, toy, tmp_path / "out", predictions=str(theirs))
    found = api.evaluate(trained_run, toy, tmp_path / "out", predictions=str(theirs), allow_seen_groups=True)
    assert any("was made by" in leak for leak in found.leaks)
    own = api.evaluate(trained_run, toy, tmp_path / "own", predictions=str(predicted))
    assert own.leaks == own.cautions == []
    nameless = rewritten(tmp_path / "nameless.zarr", predicted)
    unknown = api.evaluate(trained_run, toy, tmp_path / "unknown", predictions=str(nameless))
    assert any("is not known" in caution for caution in unknown.cautions)
