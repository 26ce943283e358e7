"""Stored predictions are judged as the model's own; those of other cells, crops or markers are refused."""

import dataclasses
import io
import json

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from rich.console import Console

from imgshared import api
from imgshared.config import EvaluateConfig, validate
from imgshared.data.store import CellStore, StoreWriter
from imgshared.evaluation import given
from imgshared.evaluation.given import Given, images_to_judge
from imgshared.prediction import predict_cells
from imgshared.types import InputError


@pytest.fixture(scope="module")
def predicted(trained_run, toy, tmp_path_factory):
    return api.predict(trained_run, toy, tmp_path_factory.mktemp("predicted") / "predicted.zarr")


def rewritten(path, source, change_ids=None, change=lambda images: images, **info):
    """The same predictions, in reverse order, with other ids or images."""
    whole = anndata.read_zarr(source)
    order = np.arange(len(whole))[::-1]
    obs = whole.obs.iloc[order]
    if change_ids:
        obs = obs.rename(index=change_ids)
    with StoreWriter(path) as writer:
        writer.append(predicted_images=change(np.asarray(whole.obsm["predicted_images"])[order]))
        writer.finish(
            obs, whole.var, np.asarray(whole.X)[order], layers={"measured": whole.layers["measured"][order]},
            obsm={"spatial": whole.obsm["spatial"][order]}, info={"crop_px": 16, "pixel_size_um": None, **info},
        )  # fmt: skip
    return path


def plain(path, source, rows=slice(None), names=str, markers=None, change=lambda images: images, **uns):
    """The same predictions as another tool would write them, which knows of nothing but AnnData."""
    predictions = CellStore(source)
    cells = predictions.obs.index[rows].map(names)
    table = anndata.AnnData(obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=list(markers or predictions.markers)))
    table.obsm["predicted_images"] = change(predictions.obsm("predicted_images")[rows])
    table.uns |= uns
    table.write_zarr(path)
    return path


def opened(run, store, path, **wishes):
    return images_to_judge(predict_cells, run, store, EvaluateConfig(predictions=str(path), **wishes))


def test_stored_predictions_are_judged_as_the_models_own(trained_run, toy, predicted, tmp_path):
    again = rewritten(tmp_path / "again.zarr", predicted)  # any order: cells are found by their ids
    own = api.evaluate(trained_run, toy, tmp_path / "own", labels=["label"])
    read = api.evaluate(trained_run, toy, tmp_path / "read", labels=["label"], predictions=str(again))
    np.testing.assert_allclose(own.fidelity["value"], read.fidelity["value"], rtol=1e-3, atol=1e-3)
    a, b = (found.classifiers.drop(columns="value") for found in (own, read))
    pd.testing.assert_frame_equal(a, b)
    apart = np.abs(own.classifiers["value"] - read.classifiers["value"]) > 1e-3
    assert apart.mean() < 0.1  # of predictions as flat as these, texture hangs on the rounding of what is stored
    assert any("were read from" in note for note in read.notes)
    assert read.coverage.empty  # nothing was calibrated for them


def test_an_anndata_of_another_tool_gives_the_same_numbers(trained_run, toy, predicted, tmp_path):
    other = plain(tmp_path / "other.zarr", predicted, rows=np.arange(80)[::-1])
    ours, theirs = (
        api.evaluate(trained_run, toy, tmp_path / path.stem, labels=["label"], predictions=str(path))
        for path in (predicted, other)
    )
    for name in ("fidelity", "groups", "checks", "features", "classifiers", "contrasts"):
        pd.testing.assert_frame_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.cautions == []
    assert any("which model made" in caution for caution in theirs.cautions)


@pytest.mark.parametrize("how", [json.dumps, dict])
def test_another_tool_may_tell_of_its_predictions(trained_run, toy, predicted, tmp_path, how):
    about = {"store_hash": toy.data_hash, "sources": ["DNA"], "run": "elsewhere"}
    path = plain(tmp_path / "told.zarr", predicted, imgshared=how(about))
    told = Given.open(path)
    assert {k: told.info[k] for k in ("store_hash", "run")} == {"store_hash": toy.data_hash, "run": "elsewhere"}
    assert list(told.info["sources"]) == ["DNA"]
    assert (told.markers, list(told.obs_names)) == (("P1", "P2"), list(toy.obs.index))
    opened(trained_run, toy, path)
    stale = plain(tmp_path / "stale.zarr", predicted, imgshared=how(about | {"store_hash": "of other crops"}))
    with pytest.raises(InputError, match=r"stale.*was predicted from other cells"):
        opened(trained_run, toy, stale)
    with pytest.raises(InputError, match=r'uns\["imgshared"\] of .*odd\.zarr is neither JSON nor a dict'):
        Given.open(plain(tmp_path / "odd.zarr", predicted, imgshared="by me"))


def test_cells_without_what_another_tool_predicts_from_need_not_be_there(
    trained_run, arrays, write_store, toy, predicted, tmp_path
):
    images, measured, masks, obs = arrays
    store = CellStore(write_store(tmp_path / "cells.zarr", images, measured, masks, obs))
    with_p2 = np.flatnonzero(measured[:, 2])
    path = plain(tmp_path / "some.zarr", predicted, rows=with_p2, imgshared={"sources": ["P2"]})
    done = opened(trained_run, store, path)(trained_run, store, np.array([64, 65]))
    assert done.measured.tolist() == [[True, False, False], [True, True, True]]
    with pytest.raises(InputError, match=r"40 of 80 cells are not in it .first: cell0.*Predict this store again"):
        opened(trained_run, store, plain(tmp_path / "fewer.zarr", predicted, rows=with_p2))


def test_only_the_cells_asked_for_are_read(trained_run, toy, predicted, tmp_path, monkeypatch):
    asked = []
    read = given.read_rows
    monkeypatch.setattr(given, "read_rows", lambda array, rows: (asked.append(list(rows)), read(array, rows))[1])
    for path in (predicted, plain(tmp_path / "other.zarr", predicted)):
        opened(trained_run, toy, path)(trained_run, toy, np.array([70, 3]))
    assert asked == [[70, 3]] * 2


def bare(path, source, without):
    """Another tool's predictions, unfinished."""
    root = zarr.open_group(plain(path, source), mode="a")
    del root[without]
    return path


def test_images_that_were_added_to_a_written_anndata_are_found(predicted, tmp_path):
    path = bare(tmp_path / "streamed.zarr", predicted, "obsm/predicted_images")
    images = np.random.default_rng(0).random((80, 2, 16, 16), np.float32)
    zarr.open_group(path, mode="a")["obsm"].create_array("predicted_images", data=images, chunks=(7, 1, 16, 16))
    np.testing.assert_array_equal(Given.open(path).images(np.array([70, 3, 8])), images[[70, 3, 8]])


def test_what_is_no_anndata_with_images_is_refused(trained_run, toy, predicted, tmp_path):
    (tmp_path / "table.h5ad").write_bytes(b"HDF")
    with pytest.raises(InputError, match=r"no store at .*none\.zarr"):
        opened(trained_run, toy, tmp_path / "none.zarr")
    with pytest.raises(InputError, match=r"table\.h5ad is not a Zarr store"):
        opened(trained_run, toy, tmp_path / "table.h5ad")
    for name in ("obs", "var"):
        with pytest.raises(InputError, match=rf"no_{name}\.zarr holds no obs and var, .*AnnData.write_zarr"):
            opened(trained_run, toy, bare(tmp_path / f"no_{name}.zarr", predicted, name))
    nothing = bare(tmp_path / "nothing.zarr", predicted, "obsm/predicted_images")
    with pytest.raises(InputError, match=r'nothing\.zarr holds no predicted_images: .*in obsm\["predicted_images"\]'):
        opened(trained_run, toy, nothing)
    with pytest.raises(InputError, match="holds no sharp_images"):
        Given.open(plain(tmp_path / "mean.zarr", predicted), sharp=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"change": lambda x: x[:, 0]}, r"have the shape \(80, 16, 16\): give .*here \(80, 2, Y, X\)"),
        ({"change": lambda x: x[:, :1]}, r"have the shape \(80, 1, 16, 16\)"),
        ({"change": lambda x: x[..., :12, :12]}, r"has crops of 12 x 12 px and .* of 16 x 16 px"),
        ({"change": lambda x: x[..., :12]}, r"has crops of 16 x 12 px"),
        ({"markers": ("P1", "P3")}, r"holds 'P3', which the model does not know. Did you mean"),
        ({"markers": ("P1", "P1")}, r"holds the marker P1 twice"),
        ({"names": lambda name: {"cell3": "cell4"}.get(name, name)}, r"holds the cell cell4 twice"),
        ({"rows": np.arange(1, 80)}, r"1 of 80 cells are not in it .first: cell0"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*names are not unique")
def test_images_of_another_shape_and_other_cells_and_markers_are_refused(
    trained_run, toy, predicted, tmp_path, changes, message
):
    path = plain(tmp_path / "other.zarr", predicted, **changes)
    with pytest.raises(InputError, match=rf"predictions: .*other\.zarr.*{message}"):
        opened(trained_run, toy, path)


def test_pixels_that_are_not_finite_are_refused_with_the_cell_named(trained_run, toy, predicted, tmp_path):
    def spoil(images):
        images[5, 1, 2, 2] = np.nan
        return images

    judge = opened(trained_run, toy, plain(tmp_path / "spoilt.zarr", predicted, change=spoil))
    judge(trained_run, toy, np.array([4, 6]))
    with pytest.raises(InputError, match=r"spoilt.*pixels of the cell cell5 that are not finite"):
        judge(trained_run, toy, np.array([4, 5, 6]))


def test_what_is_judged_is_what_was_read(trained_run, toy, predicted, tmp_path):
    bright = rewritten(tmp_path / "bright.zarr", predicted, change=lambda images: images * 0 + 500)
    judge = opened(trained_run, toy, bright)
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
    opened(trained_run, toy, same)
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
