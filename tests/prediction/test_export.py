"""What was exported predicts what the run predicts, for images of any size, and carries its contract."""

import io
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console

from imgshared import api
from imgshared.config import (
    ApolloConfig,
    Experiment,
    RegressionConfig,
    SlideConfig,
    TranslatorConfig,
    TranslatorWeights,
    validate,
)
from imgshared.data.ngff import open_ngff
from imgshared.data.store import CellStore
from imgshared.prediction import predict_cells, predict_image
from imgshared.prediction.export import KEY, multiple_of
from imgshared.prediction.trust import load_trust
from imgshared.slides import predict_slide
from imgshared.types import InputError

MEAN = TranslatorWeights(adversarial=0.0, sharp=0.0)
SMALL = {"channels": (8, 12), "marker_dim": 4}
METHODS = {
    "mean": (TranslatorConfig(**SMALL, weights=MEAN), {}),
    "two sources": (TranslatorConfig(**SMALL, weights=MEAN), {"sources": ("DNA", "P1")}),
    "sharp": (
        TranslatorConfig(**SMALL, discriminator_channels=(4,), weights=TranslatorWeights(adversarial=0.1, sharp=1.0)),
        {"sharp": True},
    ),
    "product": (
        TranslatorConfig(**SMALL, weights=MEAN, fusion="product", encoders="marker", head="laplace"),
        {"sources": ("DNA", "P1")},
    ),
    "timm": (TranslatorConfig(**SMALL, weights=MEAN, backbone="test_resnet"), {}),
    "regression": (RegressionConfig(channels=(8, 12)), {"markers": ("P2",)}),
    "regression, sources in another order": (RegressionConfig(channels=(8, 12), sources=("P1", "DNA")), {}),
}


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).poisson(300, (3, 70, 53)).astype(np.uint16)


@pytest.fixture(scope="module")
def exported(untrained, tmp_path_factory):
    """A translator's file, and the run."""
    run = replace(untrained(METHODS["mean"][0]), path=tmp_path_factory.mktemp("run"))  # another's is calibrated
    return api.export(run, tmp_path_factory.mktemp("exported") / "model.onnx"), run


def mixing(run):
    """The run, heeding only a part of what further stains tell."""
    if run.experiment.method.name == "translator":
        run.method.stacking[:] = torch.tensor([1, 0.6, 0.3])
    return run


@pytest.mark.parametrize("name", METHODS)
def test_onnx_predicts_as_the_run_does(untrained, image, tmp_path, name):
    config, wish = METHODS[name]
    run = mixing(untrained(config))
    opened = api.load_run(api.export(run, tmp_path / "m.onnx", **wish))
    want = predict_image(run, image, run.panel.markers, **wish)
    got = predict_image(opened, image, run.panel.markers)
    assert np.ptp(want) > 1  # else any two would be alike
    np.testing.assert_allclose(got, want, atol=1e-5 * np.ptp(want))


@pytest.mark.parametrize("name", ["two sources", "sharp", "regression", "regression, sources in another order"])
def test_a_pytorch_program_predicts_as_the_run_does(untrained, image, tmp_path, name):
    config, wish = METHODS[name]
    run = mixing(untrained(config))
    about = {KEY: ""}
    program = torch.export.load(api.export(run, tmp_path / "m.pt2", **wish), extra_files=about)
    said = json.loads(about[KEY])
    side = 8 * multiple_of(run)
    assert side % said["multiple"] == 0
    raw = torch.from_numpy(image[:, :side, :side].astype(np.float32))[[run.panel.index(s) for s in said["sources"]]]
    got = program.module()(raw[None].repeat(3, 1, 1, 1))  # neither batch nor size are the example's
    want = predict_image(run, image[:, :side, :side], run.panel.markers, **wish)
    np.testing.assert_allclose(got[2].detach(), want, atol=1e-5 * np.ptp(want))


def test_the_file_says_what_it_takes(exported):
    path, run = exported
    onnx.checker.check_model(str(path))
    said = json.loads(onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map[KEY])
    assert said["sources"] == ["DNA"]
    assert said["targets"] == ["P1", "P2"]
    assert said["contract"] == json.loads(json.dumps(run.contract.to_dict()))
    opened = api.load_run(path)
    assert opened.contract == run.contract
    assert opened.experiment == run.experiment


def test_an_exported_file_predicts_stores_and_slides(exported, toy_path, tmp_path):
    import tifffile

    path, run = exported
    stores = [api.predict(model, toy_path, tmp_path / name) for model, name in ((path, "a.zarr"), (run, "b.zarr"))]
    theirs, ours = (CellStore(store).obsm("predicted_images") for store in stores)
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.ptp(ours))
    slide, noise = tmp_path / "s.ome.tif", np.random.default_rng(0).poisson(300, (1, 300, 400)).astype(np.uint16)
    metadata = {"axes": "CYX", "Channel": {"Name": ["DNA"]}, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(slide, noise, tile=(128, 128), metadata=metadata, ome=True)
    images = []
    for model, name in ((api.load_run(path), "a.ome.zarr"), (run, "b.ome.zarr")):
        wish = SlideConfig(tile=256, dtype="float32")
        images.append(open_ngff(predict_slide(model, slide, tmp_path / name, wish)).read([0, 1]))
    np.testing.assert_allclose(images[0], images[1], atol=1e-5 * np.ptp(images[1]))


def test_an_exported_file_predicts_the_cells_that_an_evaluation_looks_at(exported, toy):
    path, run = exported
    theirs, ours = (predict_cells(model, toy, np.arange(9)).images["predicted"] for model in (api.load_run(path), run))
    np.testing.assert_allclose(theirs[:, 1:], ours[:, 1:], atol=1e-5 * np.ptp(ours))


def test_what_cannot_be_exported_is_refused(untrained, exported, tmp_path):
    path, run = exported
    apollo = untrained(
        ApolloConfig(channels=(8, 16, 12), shared_channels=8, shared_dim=8, specific_dim=4, marker_dim=4)
    )
    for model, name, wish, said in (
        (run, "m.bin", {}, "ends in neither"),
        (run, path, {}, "exists already"),
        (apollo, "m.onnx", {}, "apollo cannot be exported"),
        (run, "m.onnx", {"sharp": True}, "sharp=true"),
        (run, "m.onnx", {"markers": ("DNA",)}, "not among the sources"),
        (run, "m.onnx", {"markers": ("P9",)}, "P9"),
    ):
        with pytest.raises(InputError, match=said):
            api.export(model, tmp_path / name, **wish)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_opened_is_refused(exported, untrained, toy, image, tmp_path):
    path, run = exported
    with pytest.raises(InputError, match="no model at"):
        api.load_run(tmp_path / "none.onnx")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="damaged or no ONNX file"):
        api.load_run(tmp_path / "cut.onnx")
    foreign = onnx.load(str(path))
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match="no contract of imgshared"):
        api.load_run(tmp_path / "foreign.onnx")
    old = onnx.load(str(path))
    old.metadata_props[0].value = old.metadata_props[0].value.replace('"mask_neighbours"', '"other"')
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(InputError, match=r"old\.onnx was exported by an imgshared .* lacks 'mask_neighbours': export"):
        api.load_run(tmp_path / "old.onnx")
    one = api.load_run(api.export(run, tmp_path / "one.onnx", markers=("P2",)))
    assert predict_image(one, image, run.panel.markers).shape[0] == 1
    with pytest.raises(InputError, match=r"does not predict P1, but P2"):
        predict_image(one, image, run.panel.markers, markers=["P1"])
    with pytest.raises(InputError, match="predicts from DNA"):
        predict_image(one, image, run.panel.markers, sources=["P1"])
    other = replace(one, contract=replace(one.contract, crop_px=32))
    with pytest.raises(InputError, match="crop size"):
        api.predict(other, toy, tmp_path / "p.zarr")


def test_a_file_beside_its_run_has_no_calibration_of_its_own(tiny, toy, tmp_path):
    """A translator's uncertainty is made of latents and scales that the file does not give."""
    small = {"name": "translator", **SMALL, "epochs": 1, "head": "laplace", "weights": {"adversarial": 0, "sharp": 0}}
    method = validate(Experiment, {"data": "x", "method": small}, "t").method
    run = api.train(replace(tiny, method=method), out=tmp_path / "model", console=Console(file=io.StringIO()))
    assert load_trust(run.path) is not None
    path = api.export(run, tmp_path / "model.onnx")
    out = api.predict(path, toy)
    assert out == tmp_path / "model" / "predictions" / "cells.zarr"
    assert set(CellStore(out).layers()) == {"measured"}
    with pytest.raises(InputError, match="scale=true"):
        api.predict(path, toy, tmp_path / "p.zarr", scale=True)
    with pytest.raises(InputError, match="intervals=true"):
        api.predict(path, toy, tmp_path / "p.zarr", intervals=True)
    with pytest.raises(InputError, match="is an exported file"):
        api.export(path, tmp_path / "again.onnx")
