import errno
import json
import os
import subprocess
import sys

import anndata
import numpy as np
import pytest
import tifffile
import torch
import yaml

from imgshared import api, demo
from imgshared.cli import KINDS, main
from imgshared.config import Experiment, load
from imgshared.data.store import CellStore
from imgshared.evaluation import controls
from imgshared.prediction.export import KEY
from imgshared.training.log import read_metrics

VERBS = ("demo", "simulate", "prepare", "train", "ensemble", "predict", "export", "evaluate", "config")
TINY = [
    "method.channels=[8,16,12]", "method.shared_channels=8", "method.shared_dim=8", "method.specific_dim=4",
    "method.latent_epochs=1", "method.encoder_epochs=1", "train.precision=float32", "train.accelerator=cpu",
]  # fmt: skip


def fails(capsys, *words):
    """Return what a command that cannot run says, having checked how it says it."""
    try:
        code = main(list(map(str, words)))
    except SystemExit as error:  # argparse
        code = error.code
    err = capsys.readouterr().err
    assert code == 2
    assert "imgshared" in err
    assert ": error: " in err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_a_command_takes(capsys, verb):
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: imgshared {verb}")
    if verb in KINDS:
        assert f"`imgshared config {verb}` prints every key" in text


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("imgshared 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "configs/apollo.yaml", "--fast"], "unrecognised: --fast"),
        (["simulate", "out", "more"], "unrecognised: more"),
        (["demo", "out", "cells=3"], "unrecognised: cells=3"),
        (["prepare", "only_one"], "the following arguments are required: out"),
        (["train", "none.yaml"], "imgshared: error: no configuration at none.yaml"),
        (["config", "train", "method.chanels=3"], "unknown key 'method.chanels'. Did you mean 'method.channels'?"),
        (["config", "predict", "batch_size=0"], "batch_size = 0: Input should be greater than"),
        (["simulate", "out", "cels=3"], "unknown key 'cels'. Did you mean 'cells'?"),
        (["prepare", "none.csv", "out.zarr"], "none.csv"),
        (["predict", "runs/none", "none.zarr"], "no run at runs/none"),
        (["evaluate", "runs/none", "none.zarr"], "no run at runs/none"),
    ],
)
def test_bad_input_is_named_without_a_traceback(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_bad_store_or_experiment_leaves_no_run_behind(capsys, tmp_path, toy_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("data: none.zarr\n")
    assert "no store at none.zarr" in fails(capsys, "train", "a.yaml")
    for setting, message in (
        ("method.shared_channels=99", "method.shared_channels = 99 must lie between"),
        ("augment.flips=true", "must stay off"),
        ("split.test=[nobody]", "no group 'nobody'"),
        ("markers=[P9]", "no marker 'P9'"),
    ):
        assert message in fails(capsys, "train", "a.yaml", f"data={toy_path}", *TINY, setting)
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_config_prints_yaml_that_loads_back(capsys, tmp_path, kind):
    assert main(["config", kind]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "c.yaml"
    path.write_text(text)
    extra = ["data=cells.zarr"] if kind == "train" else []
    assert load(KINDS[kind], path) == load(KINDS[kind], None, extra)
    assert main(["config", kind, "--config", str(path)]) == 0
    assert capsys.readouterr().out == text


def test_settings_stand_anywhere_on_the_line(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: x\n")
    for words in (
        ["seed=4", "config", "train", "--config", str(path), "method.lr_latent=2e-3"],
        ["config", "seed=4", "train", "method.lr_latent=2e-3", "--config", str(path)],
    ):
        assert main(words) == 0
        resolved = yaml.safe_load(capsys.readouterr().out)
        assert (resolved["data"], resolved["seed"], resolved["method"]["lr_latent"]) == ("x", 4, 0.002)


def test_a_path_with_an_equals_sign_is_no_setting(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "plate=1"
    folder.mkdir()
    (folder / "c.yaml").write_text("seed: 5\n")
    assert main(["config", "simulate", "--config", "plate=1/c.yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 5
    assert "no configuration at plate=1/d.yaml" in fails(capsys, "train", "./plate=1/d.yaml")


def test_from_images_to_report(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", "sim", "cells=60", "donors=4", "field_px=192"]) == 0
    assert main(["prepare", "crop_px=32", "sim/manifest.csv", "cells.zarr", "cells=sim/cells.csv"]) == 0
    said = capsys.readouterr().out
    store = CellStore("cells.zarr")
    assert f"cells.zarr: {len(store)} cells of" in said
    assert {"treatment", "nuclear_area"} <= set(store.obs)
    (tmp_path / "tiny.yaml").write_text("method: {name: apollo}\n")
    assert main(["train", "data=cells.zarr", "tiny.yaml", *TINY, "split.test=[D04]", "split.val=[D03]"]) == 0
    run = tmp_path / "runs" / "tiny"
    assert load(Experiment, run / "config.yaml").split.test == ("D04",)
    assert {r["stage"] for r in read_metrics(run)} == {"latents", "encoders"}
    assert "holds a run already" in fails(capsys, "train", "tiny.yaml", "data=cells.zarr", *TINY)
    assert main(["predict", "runs/tiny", "ome_tiff=true", "cells.zarr"]) == 0
    out = run / "predictions" / "cells.zarr"
    assert str(out.relative_to(tmp_path)) in "".join(capsys.readouterr().out.split())
    data = anndata.read_zarr(out)
    assert data.shape == (len(store), len(store.panel) - 1)
    assert len(list((run / "predictions" / "cells.zarr.ome").iterdir())) == store.obs["image"].nunique()
    assert "exists already" in fails(capsys, "predict", "runs/tiny", "cells.zarr")
    assert main(["predict", "runs/tiny", "cells.zarr", "--overwrite", "--out", str(out)]) == 0
    assert main(["evaluate", "runs/tiny", "cells.zarr", "labels=[drug]", "factors=[nuclear_area]"]) == 0
    report = run / "evaluation" / "cells" / "report.html"
    assert all(marker in report.read_text() for marker in store.panel.proteins)
    assert "one class" in fails(capsys, "evaluate", "runs/tiny", "cells.zarr", "labels=[group]")
    assert "it needs --refit" in fails(capsys, "evaluate", "runs/tiny", "cells.zarr", "--fold", 1)
    assert main(["evaluate", "runs/tiny", "cells.zarr", "--allow-seen-groups", "--out", "seen"]) == 0
    assert "Leaking: do not cite" in (tmp_path / "seen" / "report.html").read_text()
    assert main(["evaluate", "runs/tiny", "cells.zarr", "--refit", "--fold", "2", "folds=2", "--out", "nested"]) == 0
    assert [p.name for p in (tmp_path / "nested" / "folds").iterdir()] == ["fold_2"]


def test_the_demo_ends_in_a_report_and_is_not_written_over(capsys, tmp_path, monkeypatch):
    tiny = {
        "markers": ["DNA", "LaminB1"],
        "split": {"test": ["D03", "D04"], "val": ["D02"]},
        "method": {"name": "apollo", "channels": [8, 16, 12], "shared_channels": 8, "shared_dim": 8, "specific_dim": 4,
                   "latent_epochs": 1, "encoder_epochs": 1},
        "train": {"precision": "float32", "accelerator": "cpu"},
    }  # fmt: skip
    simulate = api.simulate
    monkeypatch.setattr(demo, "EXPERIMENT", tiny)
    monkeypatch.setattr(api, "simulate", lambda out, **_: simulate(out, cells=48, donors=4, field_px=192))
    monkeypatch.setattr(controls, "COUNT", {"features": 1})
    out = tmp_path / "demo"
    assert main(["demo", str(out)]) == 0
    page = (out / "report" / "report.html").read_text()
    assert str(out / "report" / "report.html") in capsys.readouterr().out
    assert all(name in page for name in ("LaminB1", "treatment", "drug", *demo.SHARED, *demo.SPECIFIC))
    assert anndata.read_zarr(out / "predictions.zarr").shape == (len(CellStore(out / "cells.zarr")), 1)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert "exists and is not empty" in fails(capsys, "demo", out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_run_is_exported_to_one_file(capsys, tmp_path, toy_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("method: {name: regression, channels: [8, 12], epochs: 1}\n")
    words = ["train.precision=float32", "train.accelerator=cpu", "split.val=[g3]", "split.test=[g4]"]
    assert main(["train", "r.yaml", f"data={toy_path}", *words]) == 0
    capsys.readouterr()
    assert main(["export", "runs/r", "r.pt2", "markers=[P2]"]) == 0
    told, path = capsys.readouterr().out.splitlines()
    assert told.startswith("imgshared: warning: P2: ")  # one epoch teaches nothing, and who gets the file cannot know
    assert path == "r.pt2"
    about = {KEY: ""}
    torch.export.load("r.pt2", extra_files=about)
    said = json.loads(about[KEY])
    assert (said["sources"], said["targets"]) == (["DNA"], ["P2"])
    assert "exists already" in fails(capsys, "export", "runs/r", "r.pt2")


def test_a_full_disk_is_named_by_every_command(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "sim"))

    monkeypatch.setattr("imgshared.api.simulate", full)
    assert f"cannot write {tmp_path / 'sim'}: No space left" in fails(capsys, "simulate", tmp_path / "sim")


@pytest.mark.parametrize("inside", ["", "/deeper"])
@pytest.mark.parametrize("verb", ["simulate", "prepare", "train", "predict"])
def test_a_file_where_a_folder_is_needed_is_named(capsys, tmp_path, trained_run, toy_path, verb, inside):
    (tmp_path / "file").write_text("mine")
    out = f"{tmp_path / 'file'}{inside}"
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint16))
    (tmp_path / "m.csv").write_text("image\na.tif\n")
    (tmp_path / "c.yaml").write_text(f"data: {toy_path}\n")
    words = {
        "simulate": ["simulate", out, "cells=64"],
        "prepare": ["prepare", tmp_path / "m.csv", out, "channels=[DNA]"],
        "train": ["train", tmp_path / "c.yaml", "--out", out, *TINY],
        "predict": ["predict", trained_run.path, toy_path, "--out", out],
    }
    said = fails(capsys, *words[verb])
    assert str(tmp_path / "file") in said
    assert "choose " in said.lower()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EISDIR, errno.EEXIST])
def test_a_place_that_may_not_be_used_is_named_with_what_to_do(capsys, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code), "/mine/sim")

    monkeypatch.setattr("imgshared.api.simulate", refuse)
    said = fails(capsys, "simulate", "/mine/sim")
    assert f"cannot use /mine/sim: {os.strerror(code)}. " in said
    assert "hoose " in said


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output", "a")])
def test_other_faults_keep_their_traceback(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("imgshared.api.simulate", fail)
    with pytest.raises(OSError, match=error.strerror):
        main(["simulate", "sim"])


def test_it_runs_as_a_command():
    command = [sys.executable, "-m", "imgshared.cli", "config", "predict", "ful=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "imgshared: error: the command line: unknown key 'ful'. Did you mean 'full'?\n"
