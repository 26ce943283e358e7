"""What share of a stain's variation comes back, closed forms and planted reasons; `predict` warns with it."""

import io
import json
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from sklearn.metrics import r2_score

from imgshared import api
from imgshared.data.panel import Panel
from imgshared.data.store import CellStore
from imgshared.evaluation.collect import collect
from imgshared.evaluation.floors import Floors
from imgshared.evaluation.imputability import FILE, assess, imputability, shown, warnings_of, with_labels
from imgshared.evaluation.judgeable import seen
from imgshared.prediction import predict_cells
from imgshared.types import InputError

rng = np.random.default_rng(0)
N = 300
GROUPS = np.arange(N) % 6


def table(real, predicted, full=None, shared=None, marker="P"):
    """Rows as `fidelity.compare` makes them, of pictures of one pixel."""
    guesses = {"predicted": predicted, "marker_mean": np.full(N, real.mean()), "full": full, "shared": shared}
    rows = []
    for name, guess in guesses.items():
        if guess is not None:
            sums = {"aa": real**2, "ab": real * guess, "bb": guess**2}
            about = {"marker": marker, "prediction": name, "group": GROUPS, "position": np.arange(N)}
            rows.append(pd.DataFrame({**about, "intensity_real": real, "intensity_predicted": guess, **sums}))
    return pd.concat(rows, ignore_index=True)


def scored(*pictures, trained=1000):
    return imputability(table(*pictures), {"P": trained}).iloc[0]


def test_shares_are_those_of_the_variance():
    real = rng.normal(5, 1, N)
    predicted = real + rng.normal(0, 0.5, N)
    row = scored(real, predicted)
    assert row["intensity"] == pytest.approx(r2_score(real, predicted))
    assert row["image"] == pytest.approx(r2_score(real, predicted))  # one pixel: the same
    assert row["intensity_low"] < row["intensity"] < row["intensity_high"]
    assert scored(real, real)["image"] == 1
    assert scored(real, np.full(N, real.mean()))["intensity"] == pytest.approx(0)
    assert scored(real, -real)["intensity"] < 0
    assert row["reasons"] == ""


def test_labels_stand_beside_by_the_first_backend():
    found = imputability(pd.concat([table(*[rng.normal(5, 1, N)] * 2, marker=m) for m in "PQ"]), {"P": 9, "Q": 9})
    judged = pd.DataFrame(
        [
            {"label": "drug", "marker": m, "backend": b, "share": v, "share_low": v - 0.1, "share_high": v + 0.1}
            for m, b, v in (("Q", "features", 0.7), ("Q", "cnn", 0.2))
        ]
    )
    both = with_labels(found, judged).set_index("marker")
    assert both.loc["Q", "tells drug"] == 0.7
    assert both.loc["Q", "tells drug_high"] == pytest.approx(0.8)
    assert np.isnan(both.loc["P", "tells drug"])
    assert with_labels(found, pd.DataFrame()).equals(found)


def test_reasons_are_those_planted():
    real = rng.normal(5, 1, N)
    blind = np.full(N, 5.0) + rng.normal(0, 0.05, N)
    specific = scored(real, blind, real + rng.normal(0, 0.1, N))
    assert specific["rebuilt"] > 0.9
    assert specific["reasons"].startswith("carried by the stain's own specific latent")
    assert scored(real, blind, real, blind)["reasons"].startswith("carried by the stain's own specific latent")
    assert scored(real, blind, real, real)["reasons"].startswith("carried by the stain alone: its own shared latent")
    assert scored(real, real, real, real)["reasons"] == ""
    assert scored(real, blind, blind)["reasons"] == ""
    shifted = real + 2 * (GROUPS - 2.5)
    batch = scored(real, shifted)
    assert batch["within"] == pytest.approx(1)
    assert "batch effect" in batch["reasons"]
    assert "few training cells (12)" in scored(real, real, trained=12)["reasons"]


def test_it_is_what_a_whole_comparison_of_the_validation_cells_says(trained_run, toy, tmp_path):
    run, seen = replace(trained_run, path=tmp_path), []
    found = json.loads(assess(run, toy, lambda done, total: seen.append((done, total))).read_text())
    train, val = (np.flatnonzero(run.split.assign(toy.obs) == part) for part in ("train", "val"))
    floors, make = Floors(len(run.panel), run.source_channels), partial(predict_cells, run, toy)
    collect(make, toy, run.panel, train, fit=floors)
    table = collect(make, toy, run.panel, val, against=floors).fidelity
    table["group"] = toy.obs["group"].to_numpy()[val[table["position"]]]
    want = imputability(table, {"P1": 48, "P2": 24})
    assert found == json.loads(want.to_json(orient="records"))
    assert seen[-1] == (len(train) + 2 * len(val), len(train) + 2 * len(val))


def test_a_trained_run_knows_and_predict_warns(trained_run, toy, tmp_path):
    trained_run = replace(trained_run, path=tmp_path)  # whose file is changed below; the fixture's stays
    path = assess(trained_run, toy)
    rows = {r["marker"]: r for r in json.loads(path.read_text())}
    assert set(rows) == {"P1", "P2"}
    assert rows["P2"]["trained"] == 24  # of 48 cells of three groups, every other one
    assert rows["P1"]["cells"] == 16
    assert rows["P1"]["intensity_low"] is None  # one validation group has no interval
    before = path.stat().st_mtime_ns
    assert assess(trained_run, toy).stat().st_mtime_ns == before
    assert "P3: no validation cell shows it beside DNA" in warnings_of(trained_run, ["P3"])[0]
    said = warnings_of(trained_run, ["P1"])  # its brightness is its own, and two epochs teach little
    assert len(said) == 1
    assert said[0].startswith("P1: ")
    assert "few training cells" in said[0]
    with pytest.warns(UserWarning, match="P1: "):
        api.predict(trained_run, toy, tmp_path / "p.zarr", markers=["P1"])
    with pytest.raises(InputError, match="no marker 'P9'"), warnings.catch_warnings(action="error"):
        api.predict(trained_run, toy, tmp_path / "p9.zarr", markers=["P9"])  # a name that is wrong is not doubted first
    heard = io.StringIO()
    api.predict(trained_run, toy, tmp_path / "q.zarr", markers=["p1"], console=Console(file=heard, width=200))
    assert "imgshared: warning: P1" in heard.getvalue()
    assert "no validation cell shows" not in heard.getvalue()
    rows["P1"] |= {"image": 0.7, "intensity": 0.05, "reasons": ""}
    path.write_text(json.dumps(list(rows.values())))
    assert "do not rank cells by predicted brightness" in warnings_of(trained_run, ["P1"])[0]
    rows["P1"] |= {"intensity": 0.6}
    path.write_text(json.dumps(list(rows.values())))
    assert warnings_of(trained_run, ["P1"]) == []
    path.unlink()
    assert (trained_run.path / FILE).exists() is False
    assert warnings_of(trained_run, ["P1"]) == []


def test_stains_of_equal_brightness_cannot_be_judged(trained_run):
    path = trained_run.path / FILE
    before = path.read_text() if path.exists() else None
    even = imputability(table(np.full(N, 2.0), rng.normal(2, 1, N), marker="P1"), {"P1": 1000})
    path.write_text(even.to_json(orient="records"))
    assert "P1: in all validation cells it is equally bright" in warnings_of(trained_run, ["P1"])[0]
    path.unlink() if before is None else path.write_text(before)


@pytest.mark.parametrize("hidden", ["P1", "DNA"])
def test_what_training_was_not_to_see_scores_and_calibrates_nothing(tiny, toy, tmp_path, hidden):
    method, split = replace(tiny.method, latent_epochs=1, encoder_epochs=1), replace(tiny.split, val=("g2", "g3"))
    smaller = replace(tiny, method=method, split=split, unstained={hidden: ("g3",)})
    run = api.train(smaller, out=tmp_path / "run", console=Console(file=io.StringIO()))
    groups = {row["marker"]: row["groups"] for row in json.loads((run.path / FILE).read_text())}
    assert groups == ({"P1": 1, "P2": 2} if hidden == "P1" else {"P1": 1, "P2": 1})
    assert not seen(run, toy)[toy.obs["group"] == "g3", run.panel.index(hidden)].any()


def test_a_store_of_fewer_stains_showed_the_others_to_nobody(trained_run, toy, arrays, write_store, tmp_path):
    images, measured, masks, obs = arrays
    train = trained_run.split.assign(toy.obs) == "train"
    two = Panel(("DNA", "P1"), "DNA")
    fewer = CellStore(write_store(tmp_path / "f.zarr", images[:, :2], measured[:, :2], masks, obs, panel=two))
    whole = shown(trained_run, toy)
    assert shown(trained_run, fewer) == {**whole, "P1": int(measured[train, 1].sum()), "P2": 0}
