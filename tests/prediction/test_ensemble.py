"""Several runs as one: folder, calibration, prediction of cells and slides, refusals."""

import io
import shutil
from dataclasses import replace

import anndata
import numpy as np
import pytest
import tifffile
import torch
from rich.console import Console

from imgshared import api
from imgshared.cli import main
from imgshared.config import validate
from imgshared.data.ngff import open_ngff
from imgshared.prediction import ensemble, load_run, predict_cells, predict_image
from imgshared.prediction.trust import load_trust
from imgshared.types import InputError

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def plan(toy_path):
    return {"data": str(toy_path), "method": {"name": "regression", "channels": [8, 16], "epochs": 3},
            "split": {"val": ["g2", "g3"], "test": ["g4"]}, "train": {"precision": "float32"}}  # fmt: skip


@pytest.fixture(scope="module")
def members(plan, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [
        api.train(validate(type(tiny), plan | {"seed": s}, "t"), out=folder / str(s), console=QUIET) for s in (0, 1)
    ]


@pytest.fixture(scope="module")
def both(members, tmp_path_factory):
    return api.ensemble([m.path for m in members], tmp_path_factory.mktemp("both") / "run", console=QUIET)


def test_it_is_a_run_like_any_other(both, members, toy):
    again = load_run(both.path)
    assert again.seeds == [0, 1]
    assert again.title == "an ensemble of regression, seeds 0, 1"
    done = predict_cells(again, toy)
    each = np.stack([predict_cells(m, toy).images["predicted"][:, 1:] for m in members])
    np.testing.assert_allclose(done.images["predicted"][:, 1:], each.mean(0), atol=1e-5)
    np.testing.assert_allclose(done.scale[:, 1:], each.std(0), atol=1e-5)


def test_its_intervals_are_calibrated_by_what_its_members_disagree_on(both, toy, tmp_path):
    trust = load_trust(both.path)
    assert trust.groups == 2
    assert (np.diff(trust.pixel_edges[1]) >= 0).all()
    found = anndata.read_zarr(api.predict(both, toy, tmp_path / "p.zarr", intervals=True, scale=True))
    assert (found.layers["uncertainty"] > 0).all()
    assert api.open_store(tmp_path / "p.zarr").info["seeds"] == [0, 1]
    report = api.evaluate(both, toy, tmp_path / "e").report.read_text()
    assert "an ensemble of regression, seeds 0, 1" in report


def test_a_slide_is_predicted_by_it_without_seams(both, tmp_path):
    pixels = np.random.default_rng(0).poisson(300, (1, 300, 260)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "s.ome.tif", pixels, ome=True, tile=(128, 128), photometric="minisblack",
                     metadata={"axes": "CYX", "Channel": {"Name": ["DNA"]}, "PhysicalSizeX": 0.5,
                               "PhysicalSizeY": 0.5})  # fmt: skip
    out = api.predict(both, tmp_path / "s.ome.tif", tmp_path / "o.ome.zarr", tile=256, dtype="float32")
    whole = predict_image(both, pixels, ["DNA"])
    np.testing.assert_allclose(open_ngff(out).read(range(2)), whole, atol=1e-3 * np.ptp(whole))


def test_the_command_makes_one_and_the_members_may_go(members, toy, tmp_path, capsys):
    copies = [shutil.copytree(m.path, tmp_path / m.path.name) for m in members]
    assert main(["ensemble", *map(str, copies), "--out", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "both")
    for copy in copies:
        shutil.rmtree(copy)
    assert load_run(tmp_path / "both").method.scaled


def test_what_is_no_ensemble_is_refused(both, members, plan, tiny, toy, tmp_path):
    first = members[0]
    with pytest.raises(InputError, match="two runs at least"):
        api.ensemble([first], tmp_path / "x")
    with pytest.raises(InputError, match=r"trained with seed 0, as .* was"):
        api.ensemble([first, first], tmp_path / "x")
    with pytest.raises(InputError, match="is no trained run"):
        api.ensemble([first, both], tmp_path / "x")
    with pytest.raises(InputError, match="exists already"):
        api.ensemble(members, both.path)
    deeper = replace(members[1], experiment=replace(first.experiment, seed=1, method=replace(
        first.experiment.method, channels=(4, 8))))  # fmt: skip
    with pytest.raises(InputError, match=r"in an ensemble: method\.channels was"):
        api.ensemble([first, deeper], tmp_path / "x")
    other = validate(type(tiny), plan | {"seed": 1, "split": {"val": ["g1"], "test": ["g4"]}}, "t")
    moved = replace(members[1], contract=replace(first.contract, pixel_size_um=0.7))
    with pytest.raises(InputError, match=r"its pixel_size_um \(contract.json\) differ"):
        api.ensemble([first, moved], tmp_path / "x")
    with pytest.raises(InputError, match=r"split\.val was"):
        api.ensemble([first, replace(members[1], experiment=other)], tmp_path / "x")
    gone = replace(first, experiment=replace(first.experiment, data=tmp_path / "gone.zarr"))
    with pytest.raises(InputError, match="is not there: its validation groups"):
        api.ensemble([gone, members[1]], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_done_with_one_is_refused(both, toy, tmp_path):
    with pytest.raises(InputError, match="train each member with its seed"):
        api.train(both.experiment, out=tmp_path / "t", console=QUIET)
    with pytest.raises(InputError, match="is an ensemble: name one of its members"):
        api.evaluate(both, toy, tmp_path / "e", refit=True, folds=3)
    with pytest.raises(InputError, match="export one of its members"):
        api.export(both, tmp_path / "b.onnx")


def test_the_training_seed_leaves_groups_and_normaliser_as_they_are(plan, tiny, toy, tmp_path):
    plan = plan | {"split": {"val": 0.2, "test": 0.2}}
    runs = [api.train(validate(type(tiny), plan | {"seed": s}, "t"), out=tmp_path / str(s), console=QUIET)
            for s in (0, 3)]  # fmt: skip
    assert runs[0].contract == runs[1].contract
    assert not torch.equal(*(next(r.method.parameters()) for r in runs))
    other = validate(type(tiny), plan | {"split": {"val": 0.2, "test": 0.2, "seed": 1}}, "t")
    assert api.train(other, out=tmp_path / "other", console=QUIET).split != runs[0].split


def test_one_whose_calibration_was_interrupted_is_made_again(members, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(api, "calibrate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            api.ensemble(members, tmp_path / "both", console=QUIET)
    assert not (tmp_path / "both").exists()
    again = api.ensemble(members, tmp_path / "both", console=QUIET)
    assert load_trust(again.path) is not None


def test_a_full_disk_leaves_no_half_of_one(members, tmp_path, monkeypatch):
    def full(*_):
        raise InputError("cannot write the checkpoint")

    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "save", full)
        with pytest.raises(InputError, match="cannot write"):
            api.ensemble(members, tmp_path / "both", console=QUIET)
    assert not (tmp_path / "both").exists()
    assert api.ensemble(members, tmp_path / "both", console=QUIET).seeds == [0, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["both"]
