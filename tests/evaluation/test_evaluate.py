"""The whole evaluation on planted signals: what can be known is found, what cannot stays at chance."""

import copy
import json
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest

from imgshared.config import EvaluateConfig
from imgshared.data.features import frame
from imgshared.evaluation import collect
from imgshared.evaluation.evaluate import evaluate
from imgshared.types import InputError

CONFIG = EvaluateConfig(labels=("drug", "switch"), factors=("size", "switched"))


@pytest.fixture
def store(world, tmp_path):
    return world.store(tmp_path / "cells.zarr")


@pytest.fixture
def done(world, run, store, tmp_path):
    return evaluate(run, store, tmp_path / "out", CONFIG, predict=world.predict)


def auroc(found, label, marker, given):
    t = found.classifiers
    row = t[(t.label == label) & (t.marker == marker) & (t.input == given) & (t.score == "auroc")]
    return row["value"].item()


def test_evaluation_of_planted_signals(done, tmp_path, world, run):
    # A label that only the real stain shows.
    assert auroc(done, "switch", "Foci", "real") > 0.95
    assert auroc(done, "switch", "Foci", "full") > 0.95
    for given in ("predicted", "chromatin", "shared"):
        assert 0.35 < auroc(done, "switch", "Foci", given) < 0.65
    # A label that all stains share.
    assert auroc(done, "drug", "Rim", "predicted") > 0.95
    assert auroc(done, "drug", "Rim", "chromatin") > 0.9
    verdicts = done.labels.set_index(["label", "marker"])["verdict"]
    assert verdicts["switch", "Foci"] == "lost"
    assert verdicts["switch", "Rim"] == "not in the real stain"
    assert "is not the store that trained the model" in done.report.read_text()
    assert verdicts["drug", "Rim"] == "not inferior"

    # Every input is given by the same cells: those with Foci.
    counts = done.classifiers.query("label == 'switch' and marker == 'Foci'")["cells"].unique()
    held = world.obs["group"].isin(run.split.test).to_numpy()
    assert list(counts) == [int((held & world.measured[:, 2]).sum())]

    # Fidelity: the prediction of Rim clears the floors, by the right cells.
    assert done.stains.set_index("marker").loc["Rim", "verdict"] == "clears both floors"
    rim = done.fidelity.query("marker == 'Rim' and score == 'pearson'").set_index("prediction")
    assert rim.loc["predicted", "low"] <= rim.loc["predicted", "value"] <= rim.loc["predicted", "high"]
    assert rim.loc["predicted", "cells"] == held.sum()

    # The prediction of Foci is blind to the switch, but not to the cell; nothing is made of nothing.
    checks = done.checks.set_index(["marker", "score"])["value"]
    assert checks["Rim", "found"] > 0.9 > 0.1 > checks["Rim", "invented"]
    assert checks["Rim", "own"] > 0.1
    assert checks["Foci", "moves"] < checks["Rim", "moves"] < 1.1

    # Probes: size is shared, the switch is Foci's own.
    probes = done.probes.set_index(["latent", "target", "score"])["value"]
    assert probes["z_s [DNA]", "size", "r2"] > 0.9
    assert probes["z_s [DNA]", "switched", "r2"] < 0.1
    assert probes["z_m [Foci]", "switched", "r2"] > 0.6
    assert probes["z_m [Foci]", "switch", "auroc"] > 0.95

    # What differs between conditions: the drug in Rim comes again, the switch in Foci is lost.
    conditions = done.conditions.set_index(["label", "marker"])
    rim, foci = conditions.loc[("drug", "Rim")], conditions.loc[("switch", "Foci")]
    assert rim["again"] > 0.6 * rim["differ"] > 10
    assert rim["ranking_low"] > 0.7
    assert foci["differ"] > 10
    assert foci["again"] + foci["reversed"] < 0.2 * foci["differ"]
    features = done.features.set_index(["marker", "feature"])["value"]
    assert features["Rim", "mean_crop"] > 0.9 > 0.6 > abs(features["Foci", "log_ratio"])
    assert any(s.startswith("switch, ") and "features that differ in real cells" in s for s in done.summary)

    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "cache", "cells.zarr", "metrics.json", "model_card.md", "report.html", "tables",
    ]  # fmt: skip
    written = {p.name for p in (out / "tables").iterdir()}
    assert written >= {"cells.csv", "effects.csv", "pictures.csv", "contradictions.csv", "latent_maps.csv",
                       "training.csv"}  # fmt: skip
    assert {f"{name}.csv" for name, rows in done.metrics.items() if rows and name in vars(done)} - written <= {
        "leaks.csv", "cautions.csv", "notes.csv", "summary.csv",
    }  # fmt: skip
    assert json.loads((out / "metrics.json").read_text()) == done.metrics
    cells = pd.read_csv(out / "tables" / "cells.csv")
    assert {"cell_id", "image", "group", "drug", "marker", "pearson", "intensity_real"} <= set(cells)
    assert set(cells["group"]) == set(run.split.test)
    found = anndata.read_zarr(out / "cells.zarr")
    assert list(found.obs_names) == list(dict.fromkeys(cells["cell_id"]))
    for row in cells.sample(20, random_state=0).to_dict("records"):
        for score in ("pearson", "intensity_real", "own"):
            value = found[row["cell_id"], row["marker"]].layers[score].item()
            assert value == pytest.approx(row[score], rel=1e-3, nan_ok=True)
    assert found.obsm["z_s [DNA]"].shape == (len(found), 8)
    assert set(pd.read_csv(out / "tables" / "effects.csv")["outcome"]) >= {"again", "missed"}
    assert len(pd.read_csv(out / "tables" / "features.csv")) == len(done.features) > 90
    p = pd.read_parquet(out / "tables" / "probabilities.parquet")
    np.testing.assert_allclose(p.query("label == 'drug'")[["p_control", "p_treated"]].sum(axis=1), 1)
    check_report(done.report.read_text())
    log = pd.read_csv(out / "tables" / "training.csv")
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [*zip(log["step"], log["split"], strict=True)] == [(row["step"], row["split"]) for row in logged]

    picks = done.pictures.query("marker == 'Rim'").set_index("rule")["pearson"]
    assert list(picks.index) == ["worst", "10th pct", "median", "90th pct", "best"]
    assert picks.is_monotonic_increasing
    of_rim = cells.query("marker == 'Rim'")["pearson"]
    assert (picks["worst"], picks["best"]) == pytest.approx((of_rim.min(), of_rim.max()), rel=1e-4)
    card = (out / "model_card.md").read_text()
    assert "| Rim | 0." in card
    assert "drug: not inferior" in card
    for said in (
        "donor05 (300 cells) trained; donor06, donor07 (100 cells) calibrated the model",
        "4 values of group were judged",
        "a loss of AUROC up to 0.05",
    ):
        assert said in card
        assert said in done.report.read_text()


class Reader(HTMLParser):
    """Collect addresses, text and the balance of tags."""

    def __init__(self):
        super().__init__()
        self.addresses, self.text, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_report(html):
    reader = Reader()
    reader.feed(html)
    assert not reader.open
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in reader.addresses)
    assert "http" not in html.replace("http-equiv", "")
    text = " ".join(reader.text)
    for word in ("DNA", "Rim", "Foci", "clears both floors", "Provenance", "donor08", "drug", "z_m [Foci]"):
        assert word in text
    assert sum(a.startswith("data:") for a in reader.addresses) >= 7


def test_labels_are_not_needed(world, run, store, tmp_path):
    found = evaluate(run, store, tmp_path / "out", EvaluateConfig(max_cells=80), predict=world.predict)
    assert found.classifiers.empty
    assert found.metrics["cells_used"] == {"train": 80, "test": 80}
    assert "a random sample" in found.report.read_text()


def test_a_constant_picture_tells_nothing_and_a_harness_in_which_it_does_is_stamped(world, run, tmp_path, monkeypatch):
    cells = copy.copy(world)
    cells.obs = world.obs.assign(big=np.where(world.obs["size"] > world.obs["size"].median(), "big", "small"))
    store, config = cells.store(tmp_path / "cells.zarr"), EvaluateConfig(labels=("big",), margin=0.4)
    sound = evaluate(run, store, tmp_path / "sound", config, predict=world.predict)
    control = sound.controls.set_index("control").loc["marker mean"]
    assert (control["value"], control["sound"], sound.unsound) == (0.5, True, [])
    assert "Unsound" not in sound.report.read_text()
    assert sound.labels["words"].str.contains("within 0.4 ").any()

    monkeypatch.setattr(collect, "where", lambda masks, radius: frame(masks))  # features about each cell's own outline
    leaking = evaluate(run, store, tmp_path / "leaking", config, predict=world.predict)
    control = leaking.controls.set_index("control").loc["marker mean"]
    assert control["value"] > 0.8
    assert "marker mean must be at chance and reaches AUROC" in leaking.unsound[0]
    page, card = leaking.report.read_text(), (tmp_path / "leaking" / "model_card.md").read_text()
    assert "Unsound: do not use its verdicts: see the first page" in page
    assert "**Unsound: do not use its verdicts**: big (features): marker mean" in card
    assert json.loads((tmp_path / "leaking" / "metrics.json").read_text())["unsound"] == leaking.unsound


def test_results_of_two_evaluations_never_mix(done, world, run, store, tmp_path):
    assert (tmp_path / "out" / "tables" / "probabilities.parquet").exists()
    evaluate(run, store, tmp_path / "out", EvaluateConfig(max_cells=60), predict=world.predict)
    written = {p.name for p in (tmp_path / "out" / "tables").iterdir()}
    assert written >= {"cells.csv", "features.csv"}
    assert not written & {"probabilities.parquet", "effects.csv", "classifiers.csv", "labels.csv"}


def test_a_single_held_out_group_is_said_to_have_no_interval(world, run, store, tmp_path):
    run.split = replace(run.split, val=("donor06", "donor07", "donor08", "donor09", "donor10"), test=("donor11",))
    config = EvaluateConfig()
    found = evaluate(run, store, tmp_path / "out", config, predict=world.predict)
    assert found.fidelity["low"].isna().all()
    assert "no interval can be given" in found.report.read_text()


def test_classifiers_from_training_cells(world, run, store, tmp_path):
    config = EvaluateConfig(labels=("drug",), train_on="train")
    found = evaluate(run, store, tmp_path / "out", config, predict=world.predict)
    assert auroc(found, "drug", "Rim", "predicted") > 0.95
    assert any("those of predicted → real too high" in note for note in found.notes)


def test_a_group_on_both_sides_is_refused(world, run, store, tmp_path):
    config = EvaluateConfig(labels=("drug",), group="one", train_on="train")
    with pytest.raises(InputError, match="one 'same' has cells on both sides"):
        evaluate(run, store, tmp_path / "out", config, predict=world.predict)


def test_classifiers_learn_in_folds_only_where_there_are_groups_enough(world, run, store, tmp_path):
    four = evaluate(run, store, tmp_path / "four", EvaluateConfig(labels=("drug",)), predict=world.predict)
    assert "in 4 folds" in four.report.read_text()
    config = EvaluateConfig(labels=("drug",), folds=5)
    few = evaluate(run, store, tmp_path / "few", config, predict=world.predict)
    assert "learn from the model's own training cells" in few.report.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("drog",)}, "Did you mean 'drug'"),
        ({"labels": ("drug", "switch", "drug")}, "labels names 'drug' twice"),
        ({"factors": ("size", "size")}, "factors names 'size' twice"),
        ({"labels": ("one",)}, "'one' has one class"),
        ({"factors": ("image",)}, "holds no numbers"),
        ({"labels": ("drug",), "label_values": ("treted",)}, "Did you mean 'treated'"),
        ({"labels": ("drug",), "folds": 5, "train_on": "test"}, "5 folds need 5"),
        ({"labels": ("drug",), "classifiers": ("cnn",), "cnn": "resnet999"}, "cnn: timm knows no model 'resnet999'"),
    ],
)
def test_bad_input_is_named(world, run, store, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        evaluate(run, store, tmp_path / "out", EvaluateConfig(**change), predict=world.predict)
    assert not (tmp_path / "out" / "report.html").exists()


def test_settings_that_cannot_be_are_refused_before_anything_is_predicted(world, run, store, tmp_path):
    def none(wanted):
        raise InputError("no sharp output")

    run.refuse_sharp = none
    with pytest.raises(InputError, match="no sharp output"):
        evaluate(run, store, tmp_path / "out", EvaluateConfig(sharp=True), predict=None)


@pytest.mark.parametrize(("monitored", "did"), [(True, "stopped the training and calibrated"), (False, "calibrated")])
def test_validation_groups_stopped_what_they_could(world, run, store, tmp_path, monitored, did):
    run.method.stages = (SimpleNamespace(monitored=monitored),)
    page = evaluate(run, store, tmp_path / "out", EvaluateConfig(), predict=world.predict).report.read_text()
    assert f"cells) {did} the model" in page
    assert f"The validation groups {did} the model." in page
