"""Settings that a variant of a method would ignore are refused, and named with the setting that makes them idle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgshared.build import build_measured, build_method, build_normaliser, build_split
from imgshared.config import Experiment, TranslatorConfig, load
from imgshared.data.normalise import fit_normaliser
from imgshared.data.panel import Panel
from imgshared.data.store import CellStore
from imgshared.methods.base import LatentMethod, Method
from imgshared.types import InputError

PANEL = Panel(("DNA", "P1", "P2"), "DNA")
TRANSLATOR = ["method.name=translator", "method.channels=[4,6]"]
GAME = ["method.weights.adversarial=0.1", "method.discriminator_channels=[4]"]


def build(*overrides: str) -> Method:
    return build_method(load(Experiment, None, ["data=cells.zarr", *overrides]).method, PANEL, 16)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("adversarial=hinge", "method.weights.adversarial=0"),
        ("discriminator_channels=[4,4]", "method.weights.adversarial=0"),
        ("discriminator_sees_source=false", "method.weights.adversarial=0"),
        ("lr_discriminator=1e-2", "method.weights.adversarial=0"),
        ("weights.r1=1", "method.weights.adversarial=0"),
        ("weights.sharp=1", "method.weights.adversarial=0"),
        ("temperature=0.1", "method.weights.patch_nce=0"),
        ("patches=7", "method.weights.patch_nce=0"),
        ("negatives=batch", "method.weights.patch_nce=0"),
        ("agreement=triplet", "method.weights.agreement=0"),
        ("independence=cross_covariance", "method.weights.independence=0"),
        ("translation_from=0.3", "no translation term"),
        ("weights.kl=0.1", "method.fusion=mean"),
    ],
)
def test_a_setting_of_a_term_that_is_off_is_refused(setting: str, reason: str) -> None:
    with pytest.raises(InputError) as refused:
        build(*TRANSLATOR, "method.weights.agreement=0", f"method.{setting}")
    name = setting.partition("=")[0]
    assert str(refused.value) == (
        f"method.{name} has no effect with {reason}: leave it out, or set it to {default(name)}"
    )


def default(name: str) -> str:
    value: object = TranslatorConfig()
    for part in name.split("."):
        value = getattr(value, part)
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["name=cut", "nce_weight=0", "temperature=0.1"], "method.temperature has no effect with method.nce_weight=0"),
        (["name=cut", "nce_weight=0", "nce_layers=[0]"], "method.nce_layers has no effect with method.nce_weight=0"),
        (["name=cut", "nce_weight=0", "patches=7"], "method.patches has no effect with method.nce_weight=0"),
        (["name=cut", "nce_weight=0", "negatives=batch"], "method.negatives has no effect with method.nce_weight=0"),
        (["name=cut", "nce_weight=0", "identity_weight=0"], "method.identity_weight has no effect with method.nce_w"),
        (["name=cyclegan", "cycle_weight=0"], "method.identity_weight is relative to method.cycle_weight"),
        (["name=mvae", "proteins_per_step=1", "subsets=5"], "method.subsets has no effect with method.proteins_per_"),
        (["name=translator", "weights={full: 0, shared: 0}", "rebuilt=0.5"], "method.rebuilt has no effect with meth"),
        (["name=pix2pix", "channels=[4]", "dropout=0.1"], "method.dropout has no effect with one level of method.cha"),
        (["name=mvae", "beta=0", "anneal=0.5"], "method.anneal has no effect with method.beta=0"),
        (["name=translator", "fusion=product", "weights.full=0", "latent_noise=1"], "method.latent_noise has no eff"),
        (["name=translator", *(f"weights.{term}=0" for term in ("full", "shared", "cross"))], "method.weights: no te"),
        (["name=translator", "weights={full: 0, shared: 0, cross: 0, agreement: 1}"], "method.weights: no term te"),
        (["name=translator", "weights.cross=0", "hidden_proteins=9"], "method.hidden_proteins has no effect with no"),
        (
            ["name=translator", "chromatin_only=0", "hide=0", "visible_proteins=null"],
            "method.weights.cross is the error of hidden stains",
        ),
    ],
)  # fmt: skip
def test_what_other_methods_would_ignore_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        build(*(f"method.{setting}" for setting in settings))
    assert str(refused.value).startswith(said)


def test_terms_may_be_off_and_noise_is_on_the_specific_maps_of_a_product() -> None:
    small = ["method.discriminator_channels=[4]"]
    for settings in (
        ["method.name=cut", "method.nce_weight=0", *small],
        ["method.name=cyclegan", "method.cycle_weight=0", "method.identity_weight=0", *small],
        ["method.name=mvae", "method.channels=[4,6]", "method.beta=0"],
        [*TRANSLATOR, "method.fusion=product", "method.latent_noise=1"],
    ):
        assert isinstance(build(*settings), Method)  # and not refused


def test_a_sharp_output_needs_a_mean_to_stand_on() -> None:
    with pytest.raises(InputError, match=r"method.weights.sharp has no effect with method.weights.cross=0"):
        build(*TRANSLATOR, *GAME, "method.weights.cross=0", "method.weights.sharp=1")


@pytest.mark.parametrize("head", ["laplace", "gaussian"])
def test_the_error_of_a_head_with_a_scale_is_its_likelihood(head: str) -> None:
    with pytest.raises(InputError, match=f"method.error has no effect with method.head={head}"):
        build(*TRANSLATOR, f"method.head={head}", "method.error=l1")
    build(*TRANSLATOR, "method.head=mean", "method.error=l1")


def test_with_the_term_on_its_settings_are_taken() -> None:
    method = build(
        *TRANSLATOR, *GAME, "method.adversarial=hinge", "method.discriminator_sees_source=false", "method.weights.r1=1",
        "method.lr_discriminator=1e-2", "method.weights.patch_nce=1", "method.temperature=0.1", "method.patches=7",
        "method.negatives=batch", "method.weights.agreement=1", "method.agreement=triplet",
        "method.weights.independence=1", "method.independence=cross_covariance", "method.fusion=product",
        "method.weights.kl=0.1",
    )  # fmt: skip
    assert set(method.stages[0].groups) == {"generator", "discriminator"}


def test_a_discriminator_must_fit_the_crops() -> None:
    with pytest.raises(
        InputError, match=r"method\.discriminator_channels: .* patches of 70 px, larger than the crops of 16 px: name 2"
    ):
        build(*TRANSLATOR, "method.weights.adversarial=1", "method.discriminator_channels=[4,4,4,4]")


@pytest.mark.parametrize(
    ("name", "more", "latents", "sources"),
    [
        ("apollo", ["method.channels=[4,8]", "method.shared_channels=5"], True, None),
        ("translator", ["method.channels=[4,6]"], True, None),
        ("mvae", ["method.channels=[4,6]"], True, None),
        ("linear", [], False, (0,)),
        ("regression", ["method.channels=[4,6]", "method.sources=[P1,DNA]"], False, (1, 0)),
    ],
)
def test_each_name_builds_its_method(name: str, more: list[str], latents: bool, sources: Any) -> None:
    method = build(f"method.name={name}", *more)
    assert type(method).__name__.lower() == name
    assert isinstance(method, LatentMethod) == latents
    assert method.sources == sources


def test_the_configuration_that_refusals_name_is_shipped(request: pytest.FixtureRequest) -> None:
    path: Path = request.config.rootpath / "configs" / "translator_unpaired.yaml"
    weights = load(Experiment, path).method.weights  # type: ignore[union-attr]
    assert weights.cross == weights.agreement == 0
    assert weights.patch_nce > 0
    assert weights.adversarial > 0


def test_groups_can_be_learnt_from_as_if_they_lacked_a_stain(toy: CellStore) -> None:
    experiment = load(Experiment, None, ["data=x", "unstained={P1: [g0, g2], DNA: [g1]}"])
    measured = build_measured(experiment, toy, toy.panel)
    group = toy.obs["group"].astype(str).to_numpy()
    want = toy.measured.copy()
    want[(group == "g0") | (group == "g2"), toy.panel.index("P1")] = False
    want[group == "g1", toy.panel.index("DNA")] = False
    np.testing.assert_array_equal(measured, want)
    assert (measured != toy.measured).any()


@pytest.mark.parametrize(
    ("setting", "message"),
    [("{P1: [G77]}", "unstained.P1: no cell has group 'G77'"), ("{P7: [g0]}", "no marker 'P7' in the panel")],
)
def test_what_is_unstained_must_exist(toy: CellStore, setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_measured(load(Experiment, None, ["data=x", f"unstained={setting}"]), toy, toy.panel)


def test_the_normaliser_is_the_one_asked_for(toy: CellStore) -> None:
    wish = {"transform": "arcsinh", "cofactor": 2.0, "low": 5.0, "high": 90.0}
    experiment = load(Experiment, None, ["data=x", *(f"normalise.{k}={v}" for k, v in wish.items())])
    split, measured = build_split(experiment, toy), build_measured(experiment, toy, toy.panel)
    rows = (split.assign(toy.obs) == "train").nonzero()[0]
    images = toy.images(rows)[:, 0].astype(np.float64)
    ours = build_normaliser(experiment, toy, toy.panel, split, measured)
    assert (ours.transform, ours.cofactor) == ("arcsinh", 2.0)
    want = np.percentile(np.arcsinh(images / 2), [5, 90])
    assert (ours.low[0], ours.high[0]) == pytest.approx(want, rel=0.02)


def test_the_normaliser_does_not_look_at_what_is_unstained(toy: CellStore) -> None:
    experiment = load(Experiment, None, ["data=x", "split.val=[g3]", "split.test=[g4]", "unstained={P1: [g0]}"])
    split, measured = build_split(experiment, toy), build_measured(experiment, toy, toy.panel)
    rows = (split.assign(toy.obs) == "train").nonzero()[0]
    others = rows[toy.obs["group"].astype(str).to_numpy()[rows] != "g0"]
    channel = toy.panel.index("P1")
    alone = fit_normaliser(toy, others, [channel])
    ours = build_normaliser(experiment, toy, toy.panel, split, measured)
    assert (ours.low[channel], ours.high[channel]) == (alone.low[0], alone.high[0])
