"""The benchmark of methods on toy cells: it runs to its tables, goes on where it stopped, and records no half of it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SMALL = {"linear": (), "regression": ("method.channels=[8,16]", "train.batch_size=16", "train.accelerator=cpu")}


@pytest.fixture
def bench(tmp_path, toy_path, monkeypatch):
    """`benchmark_methods` with a toy dataset; its jobs run in this process, and `begun` tells which did."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_methods as script
    import methods_job

    begun = []

    def begin(work, environment):
        begun.append(work.name)
        work.result.parent.mkdir(parents=True, exist_ok=True)
        work.log.write_text("no more room\n")
        if work.job["kind"] != "task" or not script.BROKEN:
            getattr(methods_job, work.job["kind"])(json.loads(json.dumps({**work.job, "result": str(work.result)})))
        work.process = subprocess.Popen([sys.executable, "-c", ""])

    split = ('split.test=["g4"]', 'split.val=["g3"]')
    toy = script.Dataset(folds={"": split}, labels=(("label", ("control", "treated")),), shown=("P1",))
    sizes = {name: {"toy": value} for name, value in {"seconds": 0.1, "seeds": 1, "test_cells": 16}.items()}
    edition = replace(script.EDITIONS["cpu"], crop_px=16, cells_a_group={}, overrides=SMALL, **sizes)
    changed = {"DATASETS": {"toy": toy}, "EDITIONS": {"cpu": edition}, "BROKEN": False, "begin": begin}
    for name, value in changed.items():
        monkeypatch.setattr(script, name, value, raising=False)
    for name in ("SHORTEST", "LONGEST"):
        monkeypatch.setattr(methods_job, name, 0.0)
    shutil.copytree(toy_path, tmp_path / "out" / "stores" / "toy" / "cells.zarr")
    words = [str(tmp_path), str(tmp_path / "out"), "--datasets", "toy", "--methods", *SMALL, "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark_methods.py", *words, "--record", str(tmp_path / "kept")])
    return script, begun


def test_the_benchmark_trains_scores_and_goes_on(bench, tmp_path, capsys):
    script, begun = bench
    script.main()
    assert [n for n in begun if n.startswith("task")] == ["task toy linear 0", "task toy regression 0"]
    found = json.loads((tmp_path / "kept" / "methods_toy.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["linear", "regression"]
    assert found["missing"] == []
    for row in found["rows"]:
        (p1, p2) = row["markers"]
        assert (p1["marker"], p1["cells"], p2["cells"]) == ("P1", 16, 8)
        assert -1 <= p1["pearson"] <= 1
        assert p1["labels"][0]["label"] == "label"
    linear = found["rows"][0]["markers"][0]
    assert linear["gain"] == pytest.approx(0, abs=0.05)  # the floor is the same regression, on other pixels
    assert "| regression |" in capsys.readouterr().out
    assert (tmp_path / "out" / "methods_toy.png").exists()

    begun.clear()
    (tmp_path / "out" / "toy" / "regression_0" / "result.json").unlink()
    script.main()
    assert begun == ["task toy regression 0"]


def test_a_failed_task_is_told_and_nothing_is_recorded(bench, tmp_path, monkeypatch, capsys):
    script, _ = bench
    monkeypatch.setattr(script, "BROKEN", True)
    with pytest.raises(SystemExit, match=r"2 of 2 tasks failed, so nothing was recorded: task toy linear 0, task toy"):
        script.main()
    assert "FAILED: no more room" in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()
