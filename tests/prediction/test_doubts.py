"""What `predict` warns of: sources of another scale, cells unlike the calibration's, more sources than were shown."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from imgshared import api
from imgshared.config import PredictConfig, TranslatorConfig
from imgshared.data.panel import Panel
from imgshared.data.store import CellStore
from imgshared.methods.ensemble import Ensemble
from imgshared.prediction import predict
from imgshared.prediction.doubts import many_sources, other_scale, strange_cells


def intensity(images, markers=("DNA", "P1", "P2")):
    """As `prepare` records it."""
    return {
        m: {"min": float(x.min()), "p99": float(np.quantile(x, 0.99)), "max": float(x.max())}
        for m, x in zip(markers, np.moveaxis(images, 1, 0), strict=True)
    }


@pytest.fixture
def floats(trained_run, arrays, write_store, tmp_path):
    """The run as if trained on float32 counts, and what writes its store with every pixel times a factor."""
    images, measured, masks, obs = arrays

    def scaled(factor, **info):
        crops = (images * factor).astype(np.float32)
        info = {"intensity": intensity(crops)} | info
        return CellStore(write_store(tmp_path / "f.zarr", crops, measured, masks, obs, **info))

    return replace(trained_run, contract=replace(trained_run.contract, dtype="float32")), scaled


def test_a_store_of_another_scale_is_told_of_by_name_and_so_are_its_cells(floats, tmp_path):
    run, scaled = floats
    told = list[str]()
    predict(run, scaled(1 / 4096), tmp_path / "p.zarr", warn=told.append)
    assert len(told) == 2
    assert told[0].startswith(f"DNA: intensities in {tmp_path / 'f.zarr'} reach 0.")
    assert f"those of the training about {run.normaliser.ends(0)[1]:.4g}" in told[0]
    assert told[1].startswith("80 of 80 cells are unlike nearly all that the run was calibrated on, by their DNA")
    predict(run, scaled(1), tmp_path / "p.zarr", overwrite=True, warn=told.append)
    assert not [text for text in told[2:] if "scale" in text]


def test_other_sources_than_the_calibrations_are_judged_by_their_scale_alone(floats, tmp_path):
    run, scaled = floats
    told = list[str]()
    predict(run, scaled(1 / 4096), tmp_path / "p.zarr", PredictConfig(sources=("P1", "DNA")), warn=told.append)
    assert [text.split(":")[0] for text in told] == ["DNA", "P1"]


@pytest.mark.parametrize("factor", [0.1, 1, 10])
def test_dim_and_bright_stainings_are_no_other_scale(floats, factor):
    run, scaled = floats
    end = factor * run.normaliser.ends(0)[1]
    assert other_scale(run, scaled(1, intensity={"DNA": {"min": 0.0, "p99": end / 10, "max": end}}), None) == []
    assert other_scale(run, scaled(1, intensity={"DNA": {"min": 0.0, "p99": end, "max": 2 * end}}), None) == []


def test_a_store_that_does_not_say_its_intensities_is_not_judged(floats, toy):
    run, scaled = floats
    assert other_scale(run, scaled(1 / 4096, intensity={}), None) == []
    assert other_scale(run, scaled(1 / 4096, intensity={"DNA": {}}), None) == []
    assert "intensity" not in toy.info


def test_far_brighter_pixels_are_another_scale_and_one_hot_pixel_is_not(floats):
    run, scaled = floats
    end = run.normaliser.ends(0)[1]
    hot = {"DNA": {"min": 0.0, "p99": end, "max": 1000 * end}}
    assert other_scale(run, scaled(1, intensity=hot), None) == []
    eight_bits_as_sixteen = {"DNA": {"min": 0.0, "p99": 257 * end, "max": 300 * end}}
    assert other_scale(run, scaled(1, intensity=eight_bits_as_sixteen), None)


def test_markers_are_found_by_the_stores_names(floats):
    run, scaled = floats
    contract = replace(run.contract, panel=Panel(("Hoechst", "P1", "P2"), "Hoechst", {"Hoechst": ("DNA",)}))
    assert other_scale(replace(run, contract=contract), scaled(1 / 4096), None)[0].startswith("Hoechst: ")


def test_strange_cells_are_counted_and_else_the_stains_to_abstain_from(trained_run):
    unsure = np.zeros((10, 2), bool)
    assert strange_cells(trained_run, np.full(10, 0.5), unsure, [1, 2]) == []
    odd = np.array([1.0] * 5 + [0.5] * 4 + [np.nan])
    assert strange_cells(trained_run, odd, unsure, [1, 2])[0].startswith("5 of 9 cells are unlike ")
    odd[0] = np.nan
    unsure[1:6, 1] = True
    (said,) = strange_cells(trained_run, odd, unsure, [1, 2])
    assert said.startswith("most cells are better not predicted (abstain): P2 (5 of 8). ")
    assert strange_cells(trained_run, np.full(10, np.nan), np.ones((10, 2), bool), [1, 2]) == []


def test_more_proteins_than_were_ever_shown_are_told_of(untrained, trained_run, toy, tmp_path):
    def run(limit):
        return untrained(TranslatorConfig(channels=(4, 6), marker_dim=3, visible_proteins=limit))

    one, every = run(1), ("DNA", "P1", "P2")
    assert many_sources(one, None) == many_sources(one, ("DNA", "P1")) == many_sources(run(2), every) == []
    assert many_sources(run(None), every) == many_sources(trained_run, every) == []
    assert "method.visible_proteins=2" in many_sources(one, ("p2", "P1"))[0]
    assert many_sources(replace(one, method=Ensemble([one.method, one.method])), every)
    with pytest.warns(UserWarning, match=r"sources=\[...\] holds 2 proteins \(P1, P2\), .* 1 at once at most"):
        api.predict(one, toy, tmp_path / "p.zarr", sources=every, markers=["P1"])
    told = r"sources=\[...\] holds 2 proteins \(P1, P2\)"
    with pytest.warns(UserWarning, match=told):
        api.export(one, tmp_path / "m.onnx", sources=every[1:], markers=["DNA"])
    heard = io.StringIO()
    api.export(one, tmp_path / "n.onnx", console=Console(file=heard, width=500), sources=every[1:], markers=["DNA"])
    assert re.search(f"imgshared: warning: {told}", heard.getvalue())
