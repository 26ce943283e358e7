import io
import shutil
from dataclasses import replace

import anndata
import numpy as np
import pytest
import tifffile
import torch
import yaml
from rich.console import Console

from imgshared import api
from imgshared.build import build_method
from imgshared.config import Experiment, PredictConfig, TranslatorConfig, TranslatorWeights, dump, validate
from imgshared.data.panel import Panel
from imgshared.data.store import CellStore
from imgshared.prediction import predict, predict_cells, predict_image
from imgshared.types import InputError

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_predictions_are_in_raw_units_and_x_is_their_mean_in_the_mask(trained_run, toy, tmp_path):
    data = anndata.read_zarr(predict(trained_run, toy, tmp_path / "p.zarr", PredictConfig(full=True)))
    cells = predict_cells(trained_run, toy)
    images = data.obsm["predicted_images"]
    low, high = (np.array(getattr(trained_run.normaliser, b))[1:, None, None] for b in ("low", "high"))
    np.testing.assert_allclose(images, cells.images["predicted"][:, 1:] * (high - low) + low, rtol=1e-4)
    assert images.mean() > 50  # camera counts, not [0, 1]
    masks = toy.masks()
    expected = np.array([[image[mask].mean() for image in cell] for cell, mask in zip(images, masks, strict=True)])
    np.testing.assert_allclose(data.X, expected, rtol=1e-5)
    unmeasured = ~toy.measured[:, 2]
    assert (data.obsm["full_images"][unmeasured, 1] == 0).all()
    assert (data.obsm["predicted_images"][unmeasured, 1] > 0).any()
    assert np.isnan(data.obsm["X_P2"][unmeasured]).all()
    assert np.isfinite(data.obsm["X_P2"][~unmeasured]).all()
    assert np.isfinite(data.obsm["X_shared"]).all()


def test_nothing_leaks_from_the_stains_that_are_predicted(trained_run, toy, arrays, write_store, tmp_path):
    images, measured, masks, obs = arrays
    rng = np.random.default_rng(9)
    images[:, 1:] = rng.integers(0, 60000, images[:, 1:].shape)
    for seen in (measured, np.array([[True, False, False]]).repeat(80, 0)):
        other = CellStore(write_store(tmp_path / "o.zarr", images, seen, masks, obs))
        a, b = predict_cells(trained_run, toy), predict_cells(trained_run, other)
        np.testing.assert_array_equal(a.images["predicted"], b.images["predicted"])
        np.testing.assert_array_equal(a.shared["sources"], b.shared["sources"])
        np.testing.assert_array_equal(a.specific["DNA"], b.specific["DNA"])
    images[:, 0] = rng.integers(0, 60000, images[:, 0].shape)
    changed = predict_cells(trained_run, CellStore(write_store(tmp_path / "o.zarr", images, measured, masks, obs)))
    assert not np.allclose(a.images["predicted"], changed.images["predicted"])


def test_each_cell_is_predicted_from_itself_alone(trained_run, toy):
    whole = predict_cells(trained_run, toy, batch_size=80)
    for cells, batch_size in ((np.arange(80), 7), (np.array([41, 3, 3]), 1)):
        part = predict_cells(trained_run, toy, cells, batch_size=batch_size)
        np.testing.assert_array_equal(part.cells, cells)
        np.testing.assert_array_equal(part.real, whole.real[cells])
        for kind in ("images", "shared", "specific"):
            for name, value in getattr(part, kind).items():
                np.testing.assert_allclose(value, getattr(whole, kind)[name][cells], **CLOSE)


def test_the_order_of_channels_is_mended_by_name(trained_run, toy, arrays, write_store, tmp_path):
    images, measured, masks, obs = arrays
    order = [2, 0, 1]
    panel = Panel(("P2", "DNA", "P1"), "DNA")
    other = CellStore(write_store(tmp_path / "o.zarr", images[:, order], measured[:, order], masks, obs, panel=panel))
    a, b = predict_cells(trained_run, toy), predict_cells(trained_run, other)
    np.testing.assert_array_equal(a.real, b.real)
    for name in ("predicted", "full", "shared"):
        np.testing.assert_array_equal(a.images[name], b.images[name])
    out = predict(trained_run, other, tmp_path / "p.zarr")
    assert list(anndata.read_zarr(out).var_names) == ["P1", "P2"]


def test_named_markers_only(trained_run, toy, tmp_path):
    everything = anndata.read_zarr(predict(trained_run, toy, tmp_path / "a.zarr"))
    some = anndata.read_zarr(predict(trained_run, toy, tmp_path / "b.zarr", PredictConfig(markers=("p2", "DNA", "P2"))))
    assert list(some.var_names) == ["P2", "DNA"]
    np.testing.assert_array_equal(some.obsm["predicted_images"][:, 0], everything.obsm["predicted_images"][:, 1])


def test_sources(trained_run, toy, tmp_path):
    dna, p1 = predict_cells(trained_run, toy), predict_cells(trained_run, toy, sources=["P1"])
    both = predict_cells(trained_run, toy, sources=["DNA", "P1"])
    np.testing.assert_allclose(p1.shared["sources"], p1.shared["P1"], **CLOSE)
    np.testing.assert_allclose(both.shared["sources"], (dna.shared["DNA"] + dna.shared["P1"]) / 2, **CLOSE)
    assert not np.allclose(dna.images["predicted"], p1.images["predicted"])
    out = predict(trained_run, toy, tmp_path / "p.zarr", PredictConfig(sources=("P1", "DNA")))
    assert set(CellStore(out).info["sources"]) == {"P1", "DNA"}


@pytest.fixture(scope="module")
def bound(tiny, tmp_path_factory):
    """regression from P1 and DNA, with a scale; it has no latents."""
    settings = {"channels": [4, 8], "epochs": 2, "sources": ["P1", "DNA"], "error": "laplace"}
    return train_tiny(tiny, tmp_path_factory, {"name": "regression", **settings})


@pytest.fixture(scope="module")
def translator(tiny, tmp_path_factory):
    """translator with a Gaussian head."""
    settings = {"channels": [4, 6], "marker_dim": 3, "epochs": 2, "head": "gaussian"}
    return train_tiny(tiny, tmp_path_factory, {"name": "translator", **settings})


def train_tiny(tiny, tmp_path_factory, method, **more):
    plan = yaml.safe_load(dump(tiny)) | {"method": method} | more
    out = tmp_path_factory.mktemp("tiny") / "run"
    return api.train(validate(Experiment, plan, "tiny"), out=out, console=Console(file=io.StringIO()))


def test_a_method_bound_to_its_sources_predicts_from_them_and_no_others(bound, toy, tmp_path, arrays, write_store):
    for wrong in (["DNA"], ["P1"], ["P1", "DNA", "P2"], ["P2"]):
        with pytest.raises(InputError) as refused:
            predict(bound, toy, tmp_path / "p.zarr", PredictConfig(sources=tuple(wrong)))
        assert f"regression predicts from P1, DNA, as it was trained, not from {', '.join(wrong)}" in str(refused.value)
        assert "train with other method.sources" in str(refused.value)
    assert not list(tmp_path.iterdir())
    ours = predict_cells(bound, toy)
    for named in (["DNA", "P1"], ["P1", "DNA", "P1"]):
        np.testing.assert_array_equal(
            predict_cells(bound, toy, sources=named).images["predicted"], ours.images["predicted"]
        )
    assert set(CellStore(predict(bound, toy, tmp_path / "p.zarr")).info["sources"]) == {"P1", "DNA"}
    images, measured, masks, obs = arrays
    measured[:3, 1] = False
    lacking = CellStore(write_store(tmp_path / "o.zarr", images, measured, masks, obs))
    with pytest.raises(InputError, match=r"3 of the 80 .* they lack some of DNA, P1: leave them out"):
        predict_cells(bound, lacking, np.arange(80))
    np.testing.assert_array_equal(predict_cells(bound, lacking).cells, np.arange(3, 80))


def test_a_method_without_latents_writes_images_alone(bound, toy, tmp_path):
    data = anndata.read_zarr(predict(bound, toy, tmp_path / "p.zarr"))
    assert set(data.obsm) == {"predicted_images", "spatial"}
    cells = predict_cells(bound, toy)  # full and shared are asked for by default
    assert set(cells.images) == {"predicted"}
    assert cells.shared == cells.specific == {}
    for wish in ("full", "shared"):
        with pytest.raises(InputError, match=f"{wish}=true: regression has no latents to rebuild a stain from"):
            predict(bound, toy, tmp_path / "q.zarr", PredictConfig(**{wish: True}))
    assert [p.name for p in tmp_path.iterdir()] == ["p.zarr"]


@pytest.mark.parametrize("method", ["bound", "translator"])
def test_the_scale_is_written_in_raw_units(method, toy, tmp_path, request):
    run = request.getfixturevalue(method)
    out = predict(run, toy, tmp_path / "p.zarr", PredictConfig(scale=True, markers=("P2",), batch_size=17))
    scale = anndata.read_zarr(out).obsm["predicted_scale"]
    cells = predict_cells(run, toy)
    assert (cells.scale > 0).all()
    assert cells.scale.shape == cells.images["predicted"].shape == (80, 3, 16, 16)
    width = run.normaliser.high[2] - run.normaliser.low[2]  # linear: a deviation is stretched, not moved
    np.testing.assert_allclose(scale[:, 0], cells.scale[:, 2] * width, rtol=1e-2, atol=1e-3 * width)
    assert scale.dtype == np.float32
    assert "predicted_scale" not in anndata.read_zarr(predict(run, toy, tmp_path / "q.zarr")).obsm


def test_the_scale_follows_the_slope_of_the_normaliser(tiny, tmp_path_factory, toy, tmp_path):
    method = {"name": "translator", "channels": [4, 6], "marker_dim": 3, "epochs": 1, "head": "laplace"}
    run = train_tiny(tiny, tmp_path_factory, method, normalise={"transform": "arcsinh"})
    out = predict(run, toy, tmp_path / "p.zarr", PredictConfig(scale=True))
    cells, found = predict_cells(run, toy), anndata.read_zarr(out).obsm["predicted_scale"]
    low, high = (np.array(getattr(run.normaliser, b))[1:, None, None] for b in ("low", "high"))
    mean, scale = cells.images["predicted"][:, 1:], cells.scale[:, 1:]
    up, down = (np.sinh((mean + sign * scale) * (high - low) + low) * 5 for sign in (1, -1))
    np.testing.assert_allclose(found, (up - down) / 2, rtol=1e-3)


def test_latents_are_left_out_on_request(trained_run, toy):
    whole, lean = predict_cells(trained_run, toy), predict_cells(trained_run, toy, latents=False)
    assert whole.shared
    assert whole.specific
    assert lean.shared == lean.specific == {}
    np.testing.assert_array_equal(lean.images["predicted"], whole.images["predicted"])


def test_the_sharp_output_is_written_in_raw_units_beside_the_mean(trained_run, toy, tmp_path):
    weights = TranslatorWeights(sharp=0.3, adversarial=0.01)
    config = TranslatorConfig(channels=(4, 6), marker_dim=3, weights=weights, discriminator_channels=(4,))
    torch.manual_seed(0)
    method = build_method(config, trained_run.panel, trained_run.contract.crop_px).eval()
    torch.nn.init.normal_(method.network.texture.head.last.weight)  # it starts at zero
    experiment = replace(trained_run.experiment, method=config)
    run = replace(trained_run, path=tmp_path, method=method, experiment=experiment)  # never calibrated
    out = anndata.read_zarr(predict(run, toy, tmp_path / "p.zarr", PredictConfig(sharp=True, markers=("P2",))))
    cells = predict_cells(run, toy, sharp=True, full=False, shared=False)
    assert set(cells.images) == {"predicted", "sharp"}
    assert np.abs(cells.images["sharp"] - cells.images["predicted"]).max() > 1e-3
    sharp = torch.from_numpy(cells.images["sharp"][:, 2:])
    raw = run.normaliser.select([2]).inverse(sharp).numpy()
    np.testing.assert_allclose(out.obsm["sharp_images"], raw, rtol=1e-3, atol=0.5)
    field = toy.images(np.arange(1))[0]
    whole, mean = (predict_image(run, field, toy.panel.markers, markers=["P2"], sharp=s) for s in (True, False))
    np.testing.assert_allclose(whole, raw[0], rtol=1e-3, atol=0.5)
    assert np.abs(whole - mean).max() > 1
    assert "sharp_images" not in anndata.read_zarr(predict(run, toy, tmp_path / "q.zarr")).obsm


def test_a_sharp_output_is_refused_where_there_is_none(trained_run, toy, tmp_path):
    with pytest.raises(InputError, match=r"sharp=true: this apollo predicts the mean alone; train translator with"):
        predict(trained_run, toy, tmp_path / "p.zarr", PredictConfig(sharp=True))
    assert not (tmp_path / "p.zarr").exists()


def test_a_scale_is_refused_where_there_is_none(trained_run, toy, tmp_path):
    with pytest.raises(InputError, match=r"scale=true: this apollo predicts no spread; train with method.head=laplace"):
        predict(trained_run, toy, tmp_path / "p.zarr", PredictConfig(scale=True))
    assert not list(tmp_path.iterdir())


def test_the_translators_latents_are_written(translator, toy, tmp_path):
    data = anndata.read_zarr(predict(translator, toy, tmp_path / "p.zarr", PredictConfig(full=True, sources=("P1",))))
    widths = translator.method.network.widths
    assert data.obsm["X_shared"].shape == (80, sum(widths))
    assert data.obsm["X_P2"].shape == (80, 4 + 6 - sum(widths))
    assert np.isnan(data.obsm["X_P2"]).all(1).tolist() == (~toy.measured[:, 2]).tolist()
    assert list(data.var_names) == ["P2"]  # what is given is not predicted
    assert not data.obsm["full_images"][~toy.measured[:, 2], 0].any()


def test_cells_without_any_source_are_refused(trained_run, toy):
    with pytest.raises(
        InputError, match=r"40 of the 80 cells asked for cannot be predicted, they do not show P2: leave"
    ):
        predict_cells(trained_run, toy, np.arange(80), sources=["P2"])
    stained = toy.measured[:, 2].nonzero()[0]
    assert len(predict_cells(trained_run, toy, stained, sources=["P2"]).cells) == 40
    assert len(predict_cells(trained_run, toy, sources=["P2", "DNA"]).cells) == 80
    with pytest.raises(InputError, match="no cells to predict"):
        predict_cells(trained_run, toy, np.array([], int))


@pytest.mark.parametrize("key", ["markers", "sources"])
def test_unknown_markers_are_named_with_the_nearest(trained_run, toy, tmp_path, key):
    with pytest.raises(InputError, match=r"no marker 'P11' in the panel DNA, P1, P2. Did you mean 'P1'\?"):
        predict(trained_run, toy, tmp_path / "p.zarr", PredictConfig(**{key: ("P11",)}))
    assert not list(tmp_path.iterdir())


def test_a_store_that_lacks_a_source_is_refused_by_name(trained_run, arrays, write_store, tmp_path):
    images, measured, masks, obs = arrays
    panel = Panel(("DAPI", "P1"), "DAPI")
    other = CellStore(write_store(tmp_path / "o.zarr", images[:, :2], measured[:, :2], masks, obs, panel=panel))
    with pytest.raises(InputError, match=r"o\.zarr lacks the marker\(s\) DNA"):
        predict(trained_run, other, tmp_path / "p.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["o.zarr"]


def test_a_model_of_masked_cells_predicts_no_others(tiny, toy, arrays, write_store, tmp_path, tmp_path_factory):
    alone = write_store(tmp_path / "alone.zarr", *arrays, mask_neighbours=True)
    method = {"name": "linear", "pixels": 16}
    run = train_tiny(tiny, tmp_path_factory, method, data=str(alone))
    with pytest.raises(InputError, match=r"cells\.zarr: mask_neighbours is False, .*prepare with mask_neighbours=true"):
        predict(run, toy, tmp_path / "p.zarr")
    predict(run, CellStore(alone), tmp_path / "p.zarr")


def test_chromatin_alone_is_enough(trained_run, toy, arrays, write_store, tmp_path):
    images, measured, masks, obs = arrays
    panel = Panel(("DNA",), "DNA")
    only = CellStore(write_store(tmp_path / "o.zarr", images[:, :1], measured[:, :1], masks, obs, panel=panel))
    ours, whole = predict_cells(trained_run, only), predict_cells(trained_run, toy)
    np.testing.assert_array_equal(ours.images["predicted"], whole.images["predicted"])
    assert not ours.measured[:, 1:].any()
    assert np.isnan(ours.shared["P1"]).all()


def test_predictions_are_no_input(trained_run, toy, tiny, tmp_path):
    for markers in (("P1", "P2"), ("DNA", "P1", "P2")):
        made = predict(trained_run, toy, tmp_path / "p.zarr", PredictConfig(markers=markers), overwrite=True)
        uses = [
            lambda made=made: predict(trained_run, CellStore(made), tmp_path / "q.zarr"),
            lambda made=made: api.train(replace(tiny, data=str(made)), out=tmp_path / "q"),
            lambda made=made: api.evaluate(trained_run, made, tmp_path / "q"),
        ]
        for use in uses:
            with pytest.raises(InputError, match=r"p\.zarr holds predictions, not measured cells: give .*cells\.zarr"):
                use()
    with pytest.raises(InputError, match=r"p\.zarr is a folder: give a table"):
        api.prepare(made, tmp_path / "q.zarr")
    (tmp_path / "m.csv").write_text("image\np.zarr\n")
    with pytest.raises(InputError, match=r"p\.zarr is no valid OME-Zarr image"):
        api.prepare(tmp_path / "m.csv", tmp_path / "q.zarr")
    assert not list(tmp_path.glob("q*"))


def test_frames_of_predictions_are_no_input(trained_run, toy, arrays, write_store, tmp_path):
    """A cell alone in its image: its one frame is an image like any other."""
    images, measured, masks, obs = (x[:1] for x in arrays)
    store = CellStore(write_store(tmp_path / "one.zarr", images, measured, masks, obs))
    predict(trained_run, store, tmp_path / "p.zarr", PredictConfig(ome_tiff=True))
    tifffile.imwrite(tmp_path / "mask.tif", np.pad(np.ones((10, 10), np.uint8), 3))
    (tmp_path / "m.csv").write_text("image,mask\np.zarr.ome/image0.ome.tif,mask.tif\n")
    summary = api.prepare(tmp_path / "m.csv", tmp_path / "cells.zarr", crop_px=8, qc=False)
    assert CellStore(summary.path).panel.markers == ("DNA", "P1", "P2")
    assert any("P1_imputed, P2_imputed" in warning for warning in summary.warnings)


def test_the_api_takes_paths_and_settings(trained_run, toy, tmp_path):
    out = api.predict(str(trained_run.path), toy.path, tmp_path / "p.zarr", markers=["P1"], batch_size=40)
    assert list(anndata.read_zarr(out).var_names) == ["P1"]
    with pytest.raises(InputError, match=r"PredictConfig: unknown key 'marker'. Did you mean 'markers'\?"):
        api.predict(trained_run, toy, tmp_path / "q.zarr", marker=["P1"])
    with pytest.raises(InputError, match="overrides change a YAML file, not an Experiment: seed=3"):
        api.train(trained_run.experiment, "seed=3", out=tmp_path / "run")
    with pytest.raises(InputError, match=r"q\.ome\.tif: what is predicted of a cell store is a store.*ome_tiff=true"):
        api.predict(trained_run, toy, tmp_path / "q.ome.tif")
    beside = api.predict(trained_run, toy)
    assert beside == trained_run.path / "predictions" / "cells.zarr"
    assert torch.is_grad_enabled()
    shutil.rmtree(beside)


def test_the_sources_are_drawn_again_from_their_shared_latents(trained_run, toy):
    done = predict_cells(trained_run, toy, np.arange(6))
    again, real = done.images["shared"][:, 0], done.real[:, 0]  # chromatin is the source
    np.testing.assert_allclose(done.source_error, ((again - real) ** 2).mean((1, 2)), rtol=1e-4)
    assert predict_cells(trained_run, toy, np.arange(6), latents=False).source_error is None
