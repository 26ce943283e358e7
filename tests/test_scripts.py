"""The benchmark of methods on toy cells: it runs to its tables, goes on where it stopped, and records only the whole.

Its tables say what the records say, and so does README.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from imgshared.build import build_method
from imgshared.config import Experiment, dump, load
from imgshared.data.panel import Panel
from imgshared.training.notes import refuse_ignored

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SMALL = {"linear": (), "regression": ("method.channels=[8,16]", "train.batch_size=16", "train.accelerator=cpu")}


@pytest.fixture
def bench(tmp_path, toy_path, monkeypatch):
    """`benchmark_methods` with a toy dataset; its jobs run in this process, and `begun` tells which did."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_methods as script
    import methods_job
    import methods_work

    begun = []

    def begin(work, environment):
        begun.append(work.name)
        work.result.parent.mkdir(parents=True, exist_ok=True)
        work.settings.write_text(json.dumps(work.described()))
        work.log.write_text("no more room\n")
        if work.job["kind"] != "task" or not script.BROKEN:
            getattr(methods_job, work.job["kind"])(json.loads(work.settings.read_text()))
        work.process = subprocess.Popen([sys.executable, "-c", ""])

    split = ('split.test=["g4"]', 'split.val=["g3"]')
    toy = script.Dataset(folds={"": split}, labels=(("label", ("control", "treated")),), shown=("P1",))
    sizes = {name: {"toy": value} for name, value in {"seconds": 0.1, "seeds": 1, "test_cells": 16}.items()}
    edition = replace(script.EDITIONS["cpu"], crop_px=16, cells_a_group={}, overrides=SMALL, **sizes)
    changed = {"DATASETS": {"toy": toy}, "EDITIONS": {"cpu": edition}, "METHODS": tuple(SMALL), "BROKEN": False}
    for name, value in changed.items():
        monkeypatch.setattr(script, name, value, raising=False)
    monkeypatch.setattr(methods_work, "begin", begin)
    for name in ("SHORTEST", "LONGEST"):
        monkeypatch.setattr(methods_job, name, 0.0)
    shutil.copytree(toy_path, tmp_path / "out" / "stores" / "toy" / "cells.zarr")
    ready = script.store(tmp_path / "out", tmp_path, edition, "toy", 2400)
    ready.settings.write_text(json.dumps(ready.described()))
    words = [str(tmp_path), str(tmp_path / "out"), "--datasets", "toy", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark_methods.py", *words, "--record", str(tmp_path / "kept")])
    return script, begun


def test_the_benchmark_trains_scores_and_goes_on_with_its_own_results_alone(bench, tmp_path, monkeypatch, capsys):
    script, begun = bench
    script.main()
    assert [n for n in begun if n.startswith("task")] == ["task toy linear 0", "task toy regression 0"]
    found = json.loads((tmp_path / "kept" / "methods_toy.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["linear", "regression"]
    assert (found["missing"], found["overrides"]["linear"], found["workers"]) == ([], [], 1)
    assert min(found["minutes"], found["threads"]) > 0
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

    edition = script.EDITIONS["cpu"]
    for changed, said in {
        "seconds": ({"toy": 0.2}, r"seconds was 0\.1, is 0\.2"),
        "test_cells": ({"toy": 8}, "test_cells was 16, is 8"),
        "overrides": (
            {**SMALL, "regression": ("train.batch_size=8",)},
            r"overrides\.train\.batch_size was '16', is '8'",
        ),
    }.items():
        monkeypatch.setitem(script.EDITIONS, "cpu", replace(edition, **{changed: said[0]}))
        with pytest.raises(SystemExit, match=said[1]):
            script.main()
    monkeypatch.setitem(script.EDITIONS, "cpu", edition)
    monkeypatch.setattr(script, "processor", lambda: "another")
    with pytest.raises(SystemExit, match=r"speed_linear\.job\.json .*device was .*, is 'another'"):
        script.main()


@pytest.mark.parametrize("edition", ["cpu", "full"])
def test_every_method_of_an_edition_can_be_built_and_trained_however_briefly(monkeypatch, edition):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_methods as script
    import methods_job

    chosen = script.EDITIONS[edition]
    assert set(chosen.overrides) <= set(script.METHODS)
    for method in script.METHODS:
        path = SCRIPTS.parent / "configs" / f"{method}.yaml"
        overrides = ["data=cells.zarr", *chosen.overrides.get(method, ())]
        experiment, panel = load(Experiment, path, overrides), Panel(("DNA", "P1", "P2"), "DNA")
        stages = build_method(experiment.method, panel, chosen.crop_px).stages
        speeds = [{"cells_per_s": 100.0, "val_cells_per_s": 10.0, "monitored": stage.monitored} for stage in stages]
        for seconds in (1.0, 1000.0):
            epochs, settings = methods_job.budget(experiment, speeds, 1000, 300, seconds)
            short = load(Experiment, path, [*overrides, *settings])
            refuse_ignored(short.train, build_method(short.method, panel, chosen.crop_px).stages)
            assert (max(epochs) == 1) == (seconds == 1.0 or method == "linear")


def test_a_failed_task_is_told_and_nothing_is_recorded(bench, tmp_path, monkeypatch, capsys):
    script, _ = bench
    monkeypatch.setattr(script, "BROKEN", True)
    with pytest.raises(SystemExit, match=r"2 of 2 tasks failed, so the results are in .*out/results alone: task"):
        script.main()
    assert "FAILED: no more room" in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("word", [["--methods", "linear"], ["--repeats", "1"]])
def test_a_part_is_not_recorded_as_the_whole(bench, monkeypatch, capsys, word):
    script, begun = bench
    monkeypatch.setattr(sys, "argv", [*sys.argv, *word])
    with pytest.raises(SystemExit):
        script.main()
    assert f"leave out {word[0]}" in capsys.readouterr().err
    assert not begun


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import methods_tables

    return methods_tables


def row(method, turn, ratios=(1.0,), kappa=0.5, sharp=None):
    """A result of one run, all scores of a marker alike but those that are asked for."""
    label = {"label": "drug", "kappa": kappa, "agreement": 0.5, "readable": True}
    label |= {"accuracy_real": 0.9, "accuracy_predicted": 0.5}
    scores = {"pearson": 0.5, "gain": 0.0, "ssim": 0.5, "intensity_spearman": 0.5, "kid": 1.0, "labels": [label]}
    costs = dict.fromkeys(("train_seconds", "train_cells_per_s", "predict_cells_per_s", "memory_mb", "parameters"), 1.0)
    markers = [{"marker": f"P{k}", "spectral_ratio": ratio, **scores} for k, ratio in enumerate(ratios)]
    other = {"sharp": [{**m, "pearson": sharp} for m in markers]} if sharp is not None else {}
    return {"dataset": "toy", "method": method, "turn": turn, **costs, "markers": markers, **other}


def columns(tables, rows):
    """The table of such results: column to method to text."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    table = tables.overview(tables.both_outputs({"methods": methods, "rows": rows}))
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {name: {line[0]: line[k] for line in lines} for k, name in enumerate(head)}


def test_too_much_and_too_little_detail_do_not_cancel(tables):
    found = columns(tables, [row("even", "0", (1.5, 0.7)), row("odd", "0", (4.0, 0.25))])
    assert found["detail, fold off"] == {"even": "**1.5**", "odd": "4.0"}


def test_bold_is_the_best_and_what_overlaps_its_range(tables):
    values = pd.DataFrame({"best": [0.5, 0.9], "overlaps": [0.6, 0.4], "below": [0.3, 0.45], "half": [1.0, np.nan]})
    assert tables.ties(values, max) == {"best", "overlaps"}
    assert tables.ties(-values, min) == {"best", "overlaps"}


def test_chance_is_never_bold(tables):
    rows = [row(name, turn, kappa=kappa) for name, kappa in (("one", 0.04), ("two", 0.09)) for turn in "01"]
    assert columns(tables, rows)["agreement"] == {"one": "0.04 (0.04 to 0.04)", "two": "0.09 (0.09 to 0.09)"}
    assert columns(tables, [row("one", "0", kappa=0.11)])["agreement"] == {"one": "**0.11**"}


def test_a_sharp_output_has_a_row_without_costs(tables):
    found = columns(tables, [row("translator", "0", sharp=0.75)])
    assert found["r"] == {"translator": "0.50", "translator, sharp": "**0.75**"}
    assert found["parameters"] == {"translator": "1", "translator, sharp": "–"}


def test_an_edition_has_a_file_of_its_own(tables, tmp_path):
    path = tmp_path / "linear_0" / "result.json"
    path.parent.mkdir()
    path.write_text(json.dumps(row("linear", "0")))
    for edition in ("cpu", "full"):
        tables.write(tmp_path, "toy", [path], {"edition": edition})
    assert {p.name for p in tmp_path.glob("*.json")} == {"methods_toy.json", "methods_toy_full.json"}


def test_readme_takes_no_table_of_a_part(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("<!-- methods:toy -->\nold\n<!-- /methods:toy -->\n")
    made = {"provenance": {"processor": "EPYC", "gpu": None, "commit": "a1"}, "seconds": 1.0, "workers": 1}
    whole = {
        "dataset": "toy",
        "edition": "cpu",
        "methods": ["linear"],
        "missing": [],
        "rows": [row("linear", "0")],
        **made,
    }
    for changes, methods in (
        ({}, ("linear", "cut")),
        ({"repeats": 1}, ("linear",)),
        ({"missing": ["x_1"]}, ("linear",)),
    ):
        (tmp_path / "methods_toy.json").write_text(json.dumps({**whole, **changes}))
        with pytest.raises(SystemExit, match="README keeps the table that it has"):
            tables.tell(tmp_path, methods, readme=True)
    (tmp_path / "methods_toy.json").unlink()
    (tmp_path / "methods_toy_full.json").write_text(json.dumps({**whole, "edition": "full"}))
    tables.tell(tmp_path, ("linear",), readme=True)
    assert "old" in (tmp_path / "README.md").read_text()


def test_a_table_says_how_it_was_made(tables):
    rows = [{"commit": c, "dirty": d, "precision": "bf16"} for c, d in (("a1", False), ("b2", True), ("a1", False))]
    provenance = {"processor": "EPYC, 2 threads", "gpu": None, "commit": "c3"}
    result = {"provenance": provenance, "seconds": 540.0, "workers": 1, "minutes": 89.6, "rows": rows}
    said = (
        "540 s of training a run; 1 at a time on EPYC, 2 threads; bf16; 90 minutes in all; commit a1, b2 with changes."
    )
    assert tables.made_by(result) == f"({said})"
    assert tables.made_by({**result, "rows": [{}], "minutes": None}).endswith("EPYC, 2 threads; commit c3.)")


@pytest.mark.parametrize("val_cells_per_s", [50.0, 500.0])
@pytest.mark.parametrize("cells_per_s", [3.0, 30.0, 300.0])
def test_a_task_takes_its_time_with_its_validations(bench, cells_per_s, val_cells_per_s):
    import methods_job

    train, val, seconds = 1000, 300, 540.0
    stage = {"cells_per_s": cells_per_s, "val_cells_per_s": val_cells_per_s, "monitored": True}
    (epochs,), every, steps = methods_job.plan([stage], 10, train, val, seconds)
    checks = epochs // every
    step, check = 10 / cells_per_s, val / val_cells_per_s
    assert epochs == every * checks
    assert 1 <= checks <= methods_job.CHECKS
    assert checks == 1 or checks * check < 1.1 * methods_job.CHECKED * seconds
    assert 1 <= steps <= train // 10
    assert abs(epochs * steps * step + checks * check - seconds) <= 0.5 * epochs * step + 1e-9  # a step an epoch
    blind = {**stage, "monitored": False, "val_cells_per_s": float("inf")}
    (epochs,), every, steps = methods_job.plan([blind], 10, train, val, seconds)
    assert every > epochs
    assert abs(epochs * steps * step - seconds) <= 0.5 * epochs * step + 1e-9
    assert methods_job.plan([blind] * 2, 10, train, val, seconds)[::2] == (
        [max(1, round(seconds / 2 * cells_per_s / train))] * 2,
        train // 10,
    )


@pytest.mark.parametrize("dataset", ["simulated", "bbbc013", "imc_spleen"])
def test_tables_of_readme_are_those_of_the_records(tables, dataset):
    root = SCRIPTS.parent
    record = json.loads((root / "benchmarks" / f"methods_{dataset}.json").read_text())
    table = f"{tables.overview(tables.both_outputs(record))}\n\n{tables.made_by(record)}"
    assert f"<!-- methods:{dataset} -->\n{table}\n<!-- /methods:{dataset} -->" in (root / "README.md").read_text()
    assert (root / "benchmarks" / f"methods_{dataset}.md").read_text().startswith(f"# {dataset}\n\n{table}\n")


def test_labels_of_the_picture_are_not_cut(tables, tmp_path, toy_path):
    shutil.copytree(toy_path, tmp_path / "stores" / "toy" / "cells.zarr")
    crops = np.zeros((3, 16, 16), np.float32)
    paths = [tmp_path / "toy" / f"{m}_0" / "result.json" for m in ("linear", "translator")]
    for path in paths:
        path.parent.mkdir(parents=True)
        np.savez(path.parent / "shown.npz", **{f"FKHR-EGFP/{k}": crops for k in ("dna", "real", "predicted")})
    figure = tables.picture(tmp_path, "toy", paths, ("FKHR-EGFP",), (0.1, 0.5, 0.9))
    labels = [ax.texts[0].get_window_extent() for ax in figure.axes if ax.texts and "FKHR" in ax.texts[0].get_text()]
    assert len(labels) == 3
    assert all(figure.bbox.x0 <= b.x0 and figure.bbox.y0 <= b.y0 and b.y1 <= figure.bbox.y1 for b in labels)
    assert all(b.height < figure.bbox.height / 3 for b in labels)


def test_a_study_takes_no_run_of_other_settings(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import study_translator_real
    import study_translator_simulated

    begun = []

    def train(experiment, out, **_):
        begun.append(out.name)
        out.mkdir(parents=True)
        (out / "config.yaml").write_text(dump(experiment))
        (out / "metrics.jsonl").write_text('{"time_s": 1.5}\n{"time_s": 2.5}\n')

    for name in ("train", "simulate", "prepare"):
        monkeypatch.setattr(f"imgshared.{name}", train if name == "train" else lambda *_, **__: None)
    monkeypatch.setattr("imgshared.load_run", lambda path: path)
    for _ in range(2):
        study_translator_real.trained("translator", tmp_path / "cells.zarr", tmp_path / "real", "seed=1")
    assert begun == ["real"]
    told = study_translator_real.told(tmp_path / "real")
    assert (told["seed"], told["epochs"], told["overrides"]["seed"], told["train_seconds"]) == (1, 40, "1", 2.5)
    with pytest.raises(SystemExit, match=r"overrides\.seed was '1', is '2'"):
        study_translator_real.trained("translator", tmp_path / "cells.zarr", tmp_path / "real", "seed=2")
    (tmp_path / "real" / "done").write_text("")  # of the script as it was
    with pytest.raises(SystemExit, match="config was None, is 'translator'"):
        study_translator_real.trained("translator", tmp_path / "cells.zarr", tmp_path / "real", "seed=1")

    a = argparse.Namespace(out=tmp_path / "out", cells=100)
    study_translator_simulated.trained(a, a.out / "all_terms_1", 1, "method.epochs=8")
    with pytest.raises(SystemExit, match=r"overrides\.method\.epochs was '8', is '9'"):
        study_translator_simulated.trained(a, a.out / "all_terms_1", 1, "method.epochs=9")
    a.cells = 50
    with pytest.raises(SystemExit, match="cells was 100, is 50"):
        study_translator_simulated.trained(a, a.out / "all_terms_1", 1, "method.epochs=8")


def test_what_the_well_alone_tells_is_left_when_cells_of_a_well_are_shuffled(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import study_translator_real as study

    rng = np.random.default_rng(0)
    wells = np.repeat([f"B{k:02d}" for k in range(12)], 40)
    level = np.repeat(rng.normal(0, 3, 12), 40) + rng.normal(0, 1, 480)
    real = (level[:, None, None] + rng.normal(0, 0.1, (480, 8, 8))).astype(np.float32)
    names = SimpleNamespace(proteins=["P1"], index=lambda _: 0)
    run = SimpleNamespace(split=SimpleNamespace(assign=lambda _: np.full(480, "test")), panel=names)
    store = SimpleNamespace(obs=pd.DataFrame({"group": wells}))

    def predict(_run, _store, cells, **_):
        return SimpleNamespace(real=real[cells, None], images={"predicted": real[cells, None]})

    monkeypatch.setattr(study, "predict_cells", predict)
    rows = {row["prediction"]: row for row in study.against_shuffled(run, store, n=480)}
    assert rows["predicted"]["intensity Spearman"] == pytest.approx(1)
    assert rows["shuffled"]["intensity Spearman, low"] < 0 < rows["shuffled"]["intensity Spearman, high"]
    assert 0.5 < rows["shuffled in its well"]["intensity Spearman, low"] < 0.95
    assert rows["predicted"]["r"] == pytest.approx(1)
    assert abs(rows["shuffled in its well"]["r"]) < 0.1


def test_regions_of_a_record_stay_while_their_settings_are_those_of_now(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import study_translator_real as study

    path = tmp_path / "translator_imc_spleen.json"
    shutil.copy(SCRIPTS.parent / "benchmarks" / path.name, path)
    record = json.loads(path.read_text())
    assert study._kept(path) == record["regions"]  # what is published is by the script's settings of now
    assert {one["region"] for one in record["regions"]} == set(study.REGIONS)
    record["regions"] = [one for one in record["regions"] if one["seed"] == 0]
    older, other, unknown, newest = record["regions"]
    del older["settings"]["translator"]["train"]["accumulate"]  # as before there was such a setting
    other["settings"]["regression"]["method"]["epochs"] = 9
    unknown["settings"]["translator"]["method"]["gone"] = 1
    path.write_text(json.dumps(record))
    assert [one["region"] for one in study._kept(path)] == [older["region"], newest["region"]]
    assert "ROI004 (seed 0), ROI008 (seed 0) made with other settings" in capsys.readouterr().out


def test_a_record_says_what_it_ran_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import common

    common.record(tmp_path / "x.json", {"value": float("nan")})
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["value"] is None
    assert found["provenance"]["precision"] in ("bf16", "float32")
    assert {"processor", "avx512_bf16", "amx_bf16", "threads", "commit", "dirty"} <= set(found["provenance"])


def test_a_gpu_does_not_write_over_the_speed_of_a_cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmark_training import file_name

    names = [file_name(part, torch.device(d)) for part in ("speed", "methods") for d in ("cpu", "cuda")]
    assert names == ["training.json", "training_cuda.json", "training_methods.json", "training_methods_cuda.json"]
