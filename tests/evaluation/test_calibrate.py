"""Intervals hold where they promise to, for groups too; unsure and odd cells are told; `predict` writes it."""

import dataclasses
import io

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
from rich.console import Console

from imgshared import api
from imgshared.config import validate
from imgshared.data.store import CellStore
from imgshared.evaluation import coverage
from imgshared.evaluation.calibrate import calibrate, intervals, risk_limit, weighted_quantile
from imgshared.prediction import predict_cells
from imgshared.prediction.trust import FILE, describe_latent, load_trust
from imgshared.types import InputError

rng = np.random.default_rng(0)


def test_quantiles_are_of_the_weight():
    values = np.array([3.0, 1.0, 2.0, 4.0])
    assert weighted_quantile(values, np.ones(4), 0.5) == 2
    assert weighted_quantile(values, np.ones(4), 1.0) == 4
    assert weighted_quantile(values, np.array([1.0, 97.0, 1.0, 1.0]), 0.9) == 1


def test_intervals_follow_the_driver_and_hold():
    driver = rng.uniform(0, 1, 40000)
    residual = np.abs(rng.normal(0, 0.1 + driver))
    edges, half = intervals(driver, residual, np.full(40000, "g"), 8)
    assert (np.diff(half) > 0).all()
    assert half[0] == pytest.approx(1.645 * 0.16, rel=0.15)  # the normal's 90% at the first bin's middle
    fresh = rng.uniform(0, 1, 40000)
    covered = np.abs(rng.normal(0, 0.1 + fresh)) <= half[np.searchsorted(edges, fresh)]
    assert covered.mean() == pytest.approx(0.9, abs=0.01)


def test_intervals_hold_for_groups_that_were_not_there():
    """Groups differ in their shift: pooled quantiles of a few of them would be too narrow for the next."""
    shares, pooled = [], []
    for seed in range(200):
        random = np.random.default_rng(seed)
        names = np.repeat([f"g{k}" for k in range(6)], 300)
        shift = random.normal(0, 1, 7)
        residual = np.abs(np.repeat(shift[:6], 300) + random.normal(0, 0.5, 1800))
        new = np.abs(shift[6] + random.normal(0, 0.5, 300))
        half = intervals(np.zeros(1800), residual, names, 1)[1][0]
        shares.append((new <= half).mean())
        pooled.append((new <= np.quantile(residual, 0.9)).mean())
    assert np.mean(shares) > 0.87
    assert np.mean(shares) > np.mean(pooled) + 0.01


def test_a_large_group_does_not_drown_the_others():
    names = np.array(["large"] * 9000 + ["small"] * 100)
    residual = np.where(names == "small", 2.0, 1.0)
    assert intervals(np.zeros(9100), residual, names, 1)[1][0] >= 2


def test_cells_are_given_up_where_they_lose_against_the_mean_picture():
    width = np.linspace(0, 1, 100)
    assert risk_limit(width, np.where(width > 0.75, 0.1, -0.1)) == pytest.approx(0.7, abs=0.06)
    assert risk_limit(width, np.full(100, -0.1)) == np.inf
    assert risk_limit(width, np.full(100, 0.1)) == 0


@pytest.fixture(scope="module")
def sure(tiny, toy_path, tmp_path_factory):
    """A regression on the toy store; two groups calibrate."""
    plan = {"data": str(toy_path), "method": {"name": "regression", "channels": [8, 16], "epochs": 30},
            "split": {"val": ["g2", "g3"], "test": ["g4"]}, "train": {"precision": "float32"}}  # fmt: skip
    experiment = validate(type(tiny), plan, "t")
    return api.train(experiment, out=tmp_path_factory.mktemp("sure") / "run", console=Console(file=io.StringIO()))


def test_training_leaves_a_calibration_and_it_is_not_made_again(sure, toy):
    trust = load_trust(sure.path)
    assert trust.groups == 2
    assert np.isnan(trust.pixel_half[0]).all()  # chromatin is no prediction
    assert (trust.pixel_half[1:] > 0).all()
    before = (sure.path / FILE).stat().st_mtime_ns
    assert calibrate(sure, toy) == sure.path / FILE
    assert (sure.path / FILE).stat().st_mtime_ns == before


def test_intervals_cover_calibration_cells_and_odd_sources_are_told(sure, toy, make_store, tmp_path):
    trust = load_trust(sure.path)
    val = np.flatnonzero(toy.obs["group"].isin(["g2", "g3"]))
    done = predict_cells(sure, toy, val)
    table = coverage.compare(sure, trust, done)
    assert (table.groupby("marker")["pixels"].mean() > 0.88).all()
    assert (table.groupby("marker")["cell"].mean() > 0.85).all()
    assert trust.odd(trust.describe(done, 0)).mean() == pytest.approx(0.5, abs=0.1)
    blank = dataclasses.replace(done, real=np.full_like(done.real, 0.9))
    upside = dataclasses.replace(done, real=1 - done.real)
    for odd in (blank, upside):
        assert (trust.odd(trust.describe(odd, 0)) == 1).all()
        assert coverage.compare(sure, trust, odd)["abstain"].all()


def test_latents_unlike_those_of_training_are_odd_though_the_source_is_not(trained_run, toy):
    calibrate(trained_run, toy)
    trust = load_trust(trained_run.path)
    done = predict_cells(trained_run, toy, np.flatnonzero(toy.obs["group"] == "g3"))
    z = done.shared["sources"]
    assert trust.odd(trust.describe(done, 0)).mean() < 0.7
    far = dataclasses.replace(done, shared={"sources": z + 100 * z.std() * trust.components[:, 0].astype(z.dtype)})
    assert (trust.odd(trust.describe(far, 0)) == 1).all()


def test_a_latent_is_told_along_its_components_and_by_what_they_leave_over():
    along, rest = describe_latent(np.array([[4.0, 6.0, 6.0]]), np.eye(3)[:, :2], np.ones(3))
    assert along.tolist() == [[3, 5]]
    assert rest == pytest.approx(np.log(5))


def test_predict_writes_uncertainty_oddness_and_whether_to_abstain(sure, toy, tmp_path):
    out = api.predict(
        sure, toy, tmp_path / "p.zarr", intervals=True, ome_tiff=True, console=Console(file=io.StringIO())
    )
    found = anndata.read_zarr(out)
    assert found.obs["ood"].between(0, 1).all()
    assert found.layers["uncertainty"].shape == found.X.shape
    assert (found.layers["uncertainty"] > 0).all()
    assert found.layers["abstain"].dtype == bool
    held = CellStore(out).obs["group"] == "g4"
    real = toy.mean_intensity[held.to_numpy()][:, 1]
    within = np.abs(found.X[held.to_numpy(), 0] - real) <= found.layers["uncertainty"][held.to_numpy(), 0]
    assert within.mean() > 0.6
    assert found.obsm["interval_images"].shape == found.obsm["predicted_images"].shape
    assert (found.obsm["interval_images"] > 0).all()
    image = found.obs["image"].astype(str).to_numpy()
    with tifffile.TiffFile(tmp_path / "p.zarr.ome" / f"{image[0]}.ome.tif") as file:
        assert "P1_imputed_uncertainty" in file.ome_metadata
        assert "P2_imputed_abstain" in file.ome_metadata
        assert "ood_imputed" in file.ome_metadata
        frames = file.asarray()
    assert frames.shape[1] == 3 + 2 * 3 + 1
    cells = np.flatnonzero(image == image[0])
    np.testing.assert_array_equal(frames[:, 5:7], found.obsm["interval_images"][cells])
    inside = toy.masks(cells)
    for channel, values in ((7, found.layers["abstain"][cells, 0]), (9, found.obs["ood"].to_numpy()[cells])):
        np.testing.assert_allclose(frames[:, channel], values[:, None, None] * inside, rtol=1e-6)


def test_written_intervals_are_the_half_widths_in_raw_units(sure, toy, tmp_path):
    found = anndata.read_zarr(api.predict(sure, toy, tmp_path / "p.zarr", intervals=True))
    trust, done, known = load_trust(sure.path), predict_cells(sure, toy), sure.normaliser
    for k, c in enumerate((1, 2)):
        want = trust.pixels(done, c) * (known.high[c] - known.low[c])
        np.testing.assert_allclose(found.obsm["interval_images"][:, k], want, rtol=1e-3)


def test_a_stain_that_no_calibration_cell_showed_is_never_vouched_for(sure):
    trust = load_trust(sure.path)
    half = trust.pixel_half.copy()
    half[2] = np.nan
    unknown = dataclasses.replace(trust, pixel_half=half, limit=np.full(3, np.inf, np.float32))
    widths = unknown.half_widths(np.full((4, 2, 2), 0.3, np.float32), 2).mean((1, 2))
    assert unknown.abstain(widths, np.zeros(4), 2).all()
    assert not unknown.abstain(
        unknown.half_widths(np.full((4, 2, 2), 0.3, np.float32), 1).mean((1, 2)), np.zeros(4), 1
    ).any()


def test_other_sources_are_not_calibrated(trained_run, toy, tmp_path):
    calibrate(trained_run, toy)
    plain = anndata.read_zarr(api.predict(trained_run, toy, tmp_path / "a.zarr", markers=["P1"]))
    assert "uncertainty" in plain.layers
    other = api.predict(trained_run, toy, tmp_path / "b.zarr", markers=["P1"], sources=["DNA", "P2"])
    assert "uncertainty" not in anndata.read_zarr(other).layers
    with pytest.raises(InputError, match="calibrated for its usual sources alone"):
        api.predict(trained_run, toy, tmp_path / "c.zarr", markers=["P1"], sources=["DNA", "P2"], intervals=True)


def test_a_damaged_calibration_is_named(sure, tmp_path):
    (tmp_path / FILE).write_bytes((sure.path / FILE).read_bytes()[:200])
    with pytest.raises(InputError, match=r"trust\.npz is damaged"):
        load_trust(tmp_path)
    assert load_trust(tmp_path / "nowhere") is None


def test_coverage_and_risk_are_told_in_the_report(sure, toy, tmp_path):
    found = api.evaluate(sure, toy, tmp_path / "out")
    shares = found.coverage.set_index(["marker", "score"])["value"]
    assert 0.5 < shares["P1", "pixels"] <= 1
    assert set(found.risk["kept"]) == set(coverage.KEPT)
    levels = found.reliability[(found.reliability["marker"] == "P1") & (found.reliability["what"] == "pixels")]
    assert list(levels["level"]) == [0.5, 0.8, 0.9, 0.95]
    assert levels["value"].is_monotonic_increasing
    assert levels["value"].iloc[2] == shares["P1", "pixels"]
    page = found.report.read_text()
    assert "calibrated on the validation groups" in page
    assert "less like the training cells&#39; than 99% of the calibration cells" in page
    limit = load_trust(sure.path).limit[1]
    assert shares["P1", "limit"] == limit
    assert (f"{limit:.2f}" if np.isfinite(limit) else "never") in page
    assert {"width", "ood", "abstain"} <= set(found.cells)


def test_intervals_of_every_level_hold_what_they_promise_on_the_cells_they_were_made_of(sure, toy):
    done = predict_cells(sure, toy, np.flatnonzero(toy.obs["group"].isin(["g2", "g3"])))
    table = coverage.compare(sure, load_trust(sure.path), done).assign(group=0)
    found = coverage.reliability(table).groupby(["what", "level"])["value"].mean()
    for level in (0.5, 0.8, 0.9, 0.95):
        assert found["pixels", level] == pytest.approx(level, abs=0.12)  # widened for groups: seldom below
        assert found["pixels", level] > level - 0.03


def test_error_falls_as_unsure_cells_are_dropped():
    width = rng.uniform(0, 1, 1000)
    table = pd.DataFrame({"marker": "P", "group": 0, "width": width, "error": width + rng.normal(0, 0.1, 1000)})
    risk = coverage.risk(table)
    assert risk["error"].is_monotonic_decreasing
    assert risk["error"].iloc[0] == pytest.approx(table["error"].mean())
