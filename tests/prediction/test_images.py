"""Whole images with the weights of crops."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from imgshared.config import RegressionConfig, TranslatorConfig
from imgshared.data.store import CellStore
from imgshared.prediction import predict_cells, predict_image
from imgshared.types import InputError

TRANSLATOR = TranslatorConfig(channels=(8, 12), marker_dim=4)


@pytest.fixture
def field():
    return np.random.default_rng(0).integers(0, 500, (3, 131, 150)).astype(np.uint16)


@pytest.mark.parametrize("config", [TRANSLATOR, RegressionConfig(channels=(4, 8))], ids=lambda c: c.name)
def test_a_field_and_a_crop_of_it_agree_inside(untrained, field, config):
    run = untrained(config)
    names = run.panel.markers
    whole, part = predict_image(run, field, names), predict_image(run, field[:, 32:96, 48:112], names)
    assert whole.shape == (2, 131, 150)
    inside, span = (slice(None), slice(28, -28), slice(28, -28)), float(np.ptp(whole))
    np.testing.assert_allclose(part[inside], whole[:, 32:96, 48:112][inside], atol=1e-4 * span)
    assert np.abs(part - whole[:, 32:96, 48:112]).max() > 1e-2 * span  # at the border they know different things


@pytest.mark.parametrize("config", [TRANSLATOR, RegressionConfig(channels=(4, 8))], ids=lambda c: c.name)
def test_cells_of_a_store_are_predicted_as_the_field_about_them(untrained, make_store, tmp_path, config):
    run, store = untrained(config), CellStore(make_store(tmp_path / "cells.zarr", cells=6, px=64))
    run = replace(run, contract=replace(run.contract, crop_px=64))
    crops = predict_cells(run, store, np.arange(6)).images["predicted"]
    crops = run.normaliser.inverse(torch.from_numpy(crops)).numpy()[:, run.panel.indices(run.panel.proteins)]
    for crop, drawn in zip(store.images(np.arange(6)), crops, strict=True):
        field = np.pad(crop, ((0, 0), (64, 64), (48, 48)), mode="wrap")  # the cell with neighbours on all sides
        whole = predict_image(run, field, store.panel.markers)[:, 64:128, 48:112]
        inside, span = (slice(None), slice(28, -28), slice(28, -28)), float(np.ptp(whole))
        np.testing.assert_allclose(drawn[inside], whole[inside], atol=1e-4 * span)


def test_a_field_is_normalised_and_inverted_as_the_cells_were(untrained, field):
    run = untrained(TRANSLATOR)
    chromatin = run.panel.chromatin_index
    x = run.normaliser.forward(torch.from_numpy(field[:, :128, :128].astype(np.float32)))[None]
    given = torch.zeros(1, 3, dtype=torch.bool)
    given[0, chromatin] = True
    with torch.no_grad():
        mean = run.method.translate(x * given[..., None, None], given, run.panel.indices(run.panel.proteins)).mean[0]
    want = run.normaliser.select(run.panel.indices(run.panel.proteins)).inverse(mean).numpy()
    got = predict_image(run, field[:, :128, :128], run.panel.markers)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)


def test_channels_are_found_by_name_and_only_the_sources_matter(untrained, field):
    run = untrained(TRANSLATOR)
    want = predict_image(run, field, run.panel.markers, markers=["P2", "P1"])
    place = run.panel.index("DNA")
    alone = predict_image(run, field[[place]], ["dna"], markers=["P2", "P1"])
    mixed = predict_image(run, np.stack([field[0], field[place], field[2] * 3]), ["x", "DNA", "P1"])
    np.testing.assert_array_equal(alone, want)
    np.testing.assert_array_equal(mixed[::-1], want)
    from_both = predict_image(run, field, run.panel.markers, sources=["DNA", "P1"], markers=["P2"])
    assert np.abs(from_both[0] - want[0]).max() > 0


def test_what_cannot_be_predicted_is_refused(untrained, trained_run, field):
    run = untrained(TRANSLATOR)
    with pytest.raises(InputError, match="the image has no DNA, which the prediction starts from; it has P1"):
        predict_image(run, field[1:2], ["P1"])
    with pytest.raises(InputError, match="DNA and dna are all DNA, which the prediction starts from: give one"):
        predict_image(run, field, ["DNA", "P1", "dna"])
    with pytest.raises(InputError, match=r"shape \(3, 131, 150\) is not \(C, Y, X\) with the 1 channels"):
        predict_image(run, field, ["DNA"])
    with pytest.raises(InputError, match="the image has float64 pixels, the model was trained on uint16: give raw"):
        predict_image(run, field / 60000, run.panel.markers)
    with pytest.raises(InputError, match="no marker 'P9'"):
        predict_image(run, field, run.panel.markers, markers=["P9"])
    with pytest.raises(InputError, match="apollo predicts crops of 16 px alone"):
        predict_image(trained_run, field, run.panel.markers)
    masked = replace(run, contract=replace(run.contract, mask_neighbours=True))
    with pytest.raises(InputError, match=r"was trained on cells without their neighbours \(mask_neighbours=true\)"):
        predict_image(masked, field, run.panel.markers)
