"""What the translator may know, the sizes and backbones it works with, what it refuses and what it says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from imgshared.methods.translator import Translator
from imgshared.models.translation import Maps
from imgshared.types import Batch, InputError

DNA = 1
Make = Callable[..., tuple[Translator, Batch]]


def with_other(batch: Batch, channels: Sequence[int]) -> Batch:
    """Other pixels in some channels, where measured."""
    images = batch.images.clone()
    images[:, channels] = torch.where(
        batch.measured[:, channels, None, None], torch.rand_like(images[:, channels]), torch.nan
    )
    return replace(batch, images=images)


# --- what it may know -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"fusion": "product", "head": "laplace"}, {"encoders": "marker"}])
def test_a_prediction_knows_its_sources_alone(settings: dict[str, str], make_translator: Make) -> None:
    method, batch = make_translator(settings)
    method.eval()
    only = torch.zeros_like(batch.measured)
    only[:, DNA] = True
    predicted = method.translate(batch.images, only, range(3))
    other = method.translate(with_other(batch, [0, 2]).images, only, range(3))
    assert torch.equal(predicted.mean, other.mean)
    assert predicted.mean.isfinite().all()
    if predicted.scale is not None and other.scale is not None:
        assert torch.equal(predicted.scale, other.scale)
    assert not torch.allclose(predicted.mean[:, 0], predicted.mean[:, 2])
    assert not torch.allclose(method.translate(with_other(batch, [DNA]).images, only, [0]).mean, predicted.mean[:, :1])


def test_any_subset_predicts_any_other_stain_and_listens_to_all_of_it(make_translator: Make) -> None:
    method, batch = make_translator(measured=torch.ones(4, 3, dtype=torch.bool))
    method.eval()
    for n in (1, 2, 3):
        for subset in itertools.combinations(range(3), n):
            given = torch.zeros_like(batch.measured)
            given[:, list(subset)] = True
            for target in range(3):
                before = method.translate(batch.images, given, [target]).mean
                for c in range(3):
                    after = method.translate(with_other(batch, [c]).images, given, [target]).mean
                    assert torch.equal(before, after) == (c not in subset)


def test_cells_of_one_batch_may_show_different_stains(make_translator: Make) -> None:
    method, batch = make_translator()
    method.eval()
    together = method.translate(batch.images, batch.measured, [2, 0]).mean
    for i in range(10):
        alone = method.translate(batch.images[i : i + 1], batch.measured[i : i + 1], [2, 0]).mean
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_latents_of_a_stain_come_from_that_stain_and_the_fused_one_from_all(make_translator: Make) -> None:
    method, batch = make_translator()
    method.eval()
    z = method.encode(batch.images, batch.measured)
    assert z.shared.shape == (10, 2 + 3)
    assert z.specific.shape == (10, 3, 2 + 3)
    assert not z.each[~batch.measured].any()
    assert not z.specific[~batch.measured].any()
    assert method.network.trust is not None
    counts = method.network.trust.mul(10 / 6).tanh().mul(6).exp()
    for i, own in enumerate(batch.measured):
        weights = counts[own] / counts[own].sum(0)
        torch.testing.assert_close(z.shared[i], (weights * z.each[i, own]).sum(0))
    for changed in range(3):
        other = method.encode(with_other(batch, [changed]).images, batch.measured)
        rows = batch.measured[:, changed]
        for c in range(3):
            for a, b in ((z.each, other.each), (z.specific, other.specific)):
                assert torch.equal(a[:, c], b[:, c]) == (c != changed)
        assert torch.equal(z.shared[~rows], other.shared[~rows])
        assert not torch.isclose(z.shared[rows], other.shared[rows]).all(1).any()
    assert torch.equal(z.measured, batch.measured)


def test_what_a_stain_tells_by_itself_is_what_is_fused_where_it_is_alone(make_translator: Make) -> None:
    for fusion in ("mean", "product"):
        method, batch = make_translator({"fusion": fusion})
        for c in range(3):
            rows = batch.measured[:, c]
            only = torch.zeros_like(batch.measured)
            only[:, c] = rows
            fused, each = method.encode(batch.images, only).shared, method.encode(batch.images, batch.measured).each
            torch.testing.assert_close(each[rows, c], fused[rows])


def test_a_stain_is_rebuilt_from_itself_alone(make_translator: Make) -> None:
    method, batch = make_translator()
    method.eval()
    for specific in (False, True):
        rebuilt = method.reconstruct(batch.images, batch.measured, specific=specific)
        assert rebuilt.isfinite().all()
        assert not rebuilt[~batch.measured].any()
        other = method.reconstruct(with_other(batch, [0, 2]).images, batch.measured, specific=specific)
        assert torch.equal(rebuilt[:, DNA], other[:, DNA])
        alone = torch.zeros_like(batch.measured)
        alone[:, DNA] = True
        as_target = method.translate(batch.images, alone, [DNA]).mean
        assert torch.allclose(rebuilt[:, DNA], as_target[:, 0], atol=1e-5) == (not specific)


def test_what_is_hidden_in_training_does_not_help(make_translator: Make) -> None:
    everything = dict.fromkeys(("full", "shared", "norm", "identity", "cycle", "patch_nce", "adversarial"), 1.0)
    for more in ({}, {"agreement": 1.0, "independence": 1.0}):  # the last two do look at hidden stains
        method, batch = make_translator({"weights": dict(**everything, **more), "chromatin_only": 1.0})
        parts = []
        for same in (batch, with_other(batch, [0, 2])):
            torch.manual_seed(5)
            parts.append(method.loss(same, "generator").parts)
        one, other = parts
        for name in everything:
            if name != "norm" or not more:  # it weighs all that is encoded
                assert one[name].item() == other[name].item(), name


def test_noise_is_of_training_alone(make_translator: Make) -> None:
    for settings in ({"latent_noise": 0.5}, {"fusion": "product"}):
        method, batch = make_translator({**settings, "weights": {"shared": 1.0}, "chromatin_only": 1.0})
        losses = {method.loss(batch, "generator").total.item() for _ in range(3)}
        assert len(losses) == 3
        method.eval()
        first, again = (method.translate(batch.images, batch.measured, [0]).mean for _ in range(2))
        assert torch.equal(first, again)


def test_a_few_of_the_hidden_stains_are_predicted_in_a_step(make_translator: Make) -> None:
    method, batch = make_translator({"weights": {"cross": 1.0}, "hidden_proteins": 1, "chromatin_only": 1.0})
    other = method.network.decode
    drawn: list[Tensor] = []

    def kept(trunk: Tensor, channels: Tensor, *more: Any) -> Any:
        drawn.append(channels)
        return other(trunk, channels, *more)

    method.network.decode = kept  # type: ignore[method-assign]
    for _ in range(20):
        method.loss(batch, "generator")
    proteins = batch.measured[:, [0, 2]].sum(1)
    assert all(len(channels) == (proteins > 0).sum() for channels in drawn)
    assert torch.cat(drawn).unique().tolist() == [0, 2]


def test_keys_of_patch_nce_carry_no_gradient(make_translator: Make) -> None:
    method, batch = make_translator({"weights": {"patch_nce": 1.0}})
    step = method._begin(batch)
    source = step.stains.first_visible(len(batch.index))
    again = Maps([torch.randn(len(source), *h.shape[1:]) for h in step.maps.shared])
    method._patch_nce(step, again, source).backward()
    assert not any(p.grad is not None for p in method.network.parameters())
    assert method.projection is not None
    assert all(p.grad is not None for p in method.projection.parameters())


# --- sizes, heads, backbones ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mean", "laplace", "gaussian"])
def test_a_predicted_scale_is_a_standard_deviation(head: str, make_translator: Make) -> None:
    method, batch = make_translator({"head": head})
    method.eval()
    prediction = method.translate(batch.images, batch.measured, [2, 0])
    if head == "mean":
        assert prediction.scale is None
        return
    assert prediction.scale is not None
    assert prediction.scale.shape == prediction.mean.shape == (10, 2, 16, 16)
    assert (prediction.scale > 0).all()
    trunk = method._fused(batch.images, batch.measured)[0]
    _, log_scale = method.network.decode(trunk, torch.full((10,), 2), (16, 16))
    assert log_scale is not None
    kind = torch.distributions.Laplace if head == "laplace" else torch.distributions.Normal
    torch.testing.assert_close(prediction.scale[:, :1], kind(torch.zeros(1), log_scale.exp()).stddev)


@pytest.mark.parametrize("backbone", ["conv", "resnet10t"])
@pytest.mark.parametrize("side", [19, (22, 33)])
def test_crops_of_any_size_train_and_predict(backbone: str, side: int | tuple[int, int], make_translator: Make) -> None:
    terms = ("full", "shared", "cross", "identity", "agreement", "adversarial", "patch_nce", "cycle")
    method, batch = make_translator(
        {"backbone": backbone, "channels": (4, 6, 8), "weights": dict.fromkeys(terms, 1.0)}, side=side
    )
    total = method.loss(batch, "generator").total
    total.backward()
    assert total.isfinite()
    method.turn("discriminator")
    assert method.loss(batch, "discriminator").total.isfinite()
    method.eval()
    size = batch.images.shape[2:]
    assert method.translate(batch.images, batch.measured, [0, 2]).mean.shape == (10, 2, *size)
    assert method.reconstruct(batch.images, batch.measured, specific=True).shape == (10, 3, *size)
    assert method.validate(batch).total.isfinite()


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "side", "said"),
    [
        ({"channels": (4, 4, 4, 4)}, 8, "4 levels halve the image to 1/16, crops are 8 px: name fewer"),
        ({"channels": (4, 4, 4, 4)}, 16, "4 levels halve the image to 1/16, crops are 16 px: name fewer"),
        ({"channels": (4, 1)}, 16, "a level needs two, one shared and one specific"),
        ({"discriminator_channels": (4,) * 4, "weights": {"adversarial": 1.0}}, 16, "patches of 70 px, larger than"),
        ({"backbone": "resnet10x"}, 16, "method.backbone: timm knows no model 'resnet10x'. Did you mean 'resnet10t'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(settings: dict[str, Any], side: int, said: str, make_translator: Make) -> None:
    with pytest.raises(InputError) as refused:
        make_translator(settings, side=side)
    assert said in str(refused.value)


def test_the_discriminator_that_sees_the_source_is_shown_cells_with_chromatin(make_translator: Make) -> None:
    measured = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    measured[measured[:, DNA], 2] = False  # never with chromatin: no pair shows what it should look like
    measured[~measured.any(1), 0] = True
    for seed in range(5):
        method, batch = make_translator(
            {"weights": {"adversarial": 1.0}, "discriminator_sees_source": True}, measured=measured, seed=seed
        )
        seen: list[Tensor] = []
        assert method.discriminator is not None
        method.discriminator.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(inputs[0]))
        method.loss(batch, "generator")
        method.loss(batch, "discriminator")
        chromatin = batch.images[measured[:, DNA], DNA]
        assert len(seen) == 3
        for images in seen:
            assert images.shape[1] == 2
            for image in images:
                assert (image[0] == chromatin).all((1, 2)).any()


def test_a_discriminator_that_sees_the_source_keeps_no_stain_from_patch_contrast_and_cycle(
    make_translator: Make,
) -> None:
    measured = torch.tensor([[True, True, False]] * 4 + [[False, False, True]] * 4)  # P2 never meets chromatin
    terms = {"full": 1.0, "patch_nce": 1.0, "cycle": 1.0}
    method, batch = make_translator({"weights": terms, "discriminator_sees_source": True}, measured=measured)
    assert set(method.loss(batch, "generator").parts) == set(terms)  # there is no discriminator to see anything
    method, batch = make_translator(
        {"weights": {**terms, "adversarial": 1.0}, "discriminator_sees_source": True}, measured=measured
    )
    drawn: set[tuple[int, int]] = set()
    judged: list[Tensor] = []
    method.network.encode = lambda images, channels, encode=method.network.encode: (  # type: ignore[method-assign]
        drawn.update(enumerate(channels.tolist())) or encode(images, channels)
    )
    assert method.discriminator is not None
    method.discriminator.register_forward_hook(lambda module, inputs, out: judged.append(inputs[1]))
    for _ in range(5):
        method.loss(batch, "generator")
        method.loss(batch, "discriminator")
    assert {c for _, c in drawn} == {0, 1, 2}
    assert set(torch.cat(judged).tolist()) == {0}  # the one stain that is known beside chromatin


def test_a_discriminator_that_has_won_is_said(make_translator: Make) -> None:
    method, _ = make_translator()
    assert method.signs({"discriminator/accuracy": 0.9}) == method.signs({}) == []
    (said,) = method.signs({"discriminator/accuracy": 1.0})
    assert "lr_discriminator" in said


def test_a_discriminator_that_never_moves_is_said_once_it_should(make_translator: Make) -> None:
    method, _ = make_translator({"weights": {"adversarial": 1.0}, "translation_from": 0.5})
    method.progress = 0.4
    assert method.signs({"full": 0.1}) == []
    method.progress = 0.6
    (said,) = method.signs({"full": 0.1})
    assert said.startswith("the discriminator had no step")
    assert method.signs({"discriminator/accuracy": 0.9}) == []
    without, _ = make_translator({"weights": {"cross": 1.0}})
    without.progress = 0.6
    assert without.signs({"full": 0.1}) == []


def test_a_posterior_that_collapses_is_said(make_translator: Make) -> None:
    method, batch = make_translator({"fusion": "product", "weights": {"full": 1.0, "kl": 1.0}})
    parts = method.loss(batch, "generator").parts
    assert parts["active_dimensions"] > 0.5 * sum(method.network.widths)
    assert method.signs({name: value.item() for name, value in parts.items()}) == []
    with torch.no_grad():
        for layer in method.network.log_std:
            layer.bias.fill_(50.0)  # experts as wide as they can be: what they say is the prior
    values = {name: value.item() for name, value in method.loss(batch, "generator").parts.items()}
    (said,) = method.signs(values)
    assert f"information (0 of {sum(method.network.widths)}): posterior collapse; lower method.weights.kl" in said
    unwatched, batch = make_translator({"fusion": "product", "weights": {"full": 1.0}})
    assert set(unwatched.loss(batch, "generator").parts) == {"full"}


def test_stains_whose_dependence_is_hardly_ever_estimated_are_named(make_translator: Make) -> None:
    measured = torch.zeros(16, 3, dtype=torch.bool)
    measured[:, DNA] = measured[:5, 0] = measured[:9, 2] = True
    settings = {"weights": {"full": 1.0, "independence": 1.0}, "chromatin_only": 1.0, "hidden_proteins": None}
    method, batch = make_translator(settings, measured=measured)
    for _ in range(3):
        method.loss(batch, "generator")
    (said,) = method.signs({})
    assert said.startswith("independence was hardly ever estimated of P0: fewer than 8 cells of a step")
    assert method.signs({}) == []  # an epoch each
    method.loss(replace(batch, measured=measured & (torch.arange(16) < 8)[:, None]), "generator")
    (said,) = method.signs({})
    assert "estimated of P0:" in said
    method.loss(replace(batch, measured=measured & (torch.arange(16) < 7)[:, None]), "generator")
    (said,) = method.signs({})
    assert "estimated of P0, DNA, P2:" in said
    assert make_translator()[0].signs({}) == []


@torch.no_grad()
def test_cells_without_any_stain_have_the_latents_of_none(make_translator: Make) -> None:
    method, batch = make_translator()
    method.eval()
    nothing = torch.zeros_like(batch.measured)
    alone = method.encode(batch.images[:2], nothing[:2])
    one = nothing.clone()
    one[0, DNA] = True
    beside = method.encode(batch.images, one)
    assert torch.equal(alone.shared[0], beside.shared[1])
    assert method.translate(batch.images, nothing, [0]).mean.isfinite().all()
    assert not method.reconstruct(batch.images, nothing, specific=True).any()


# --- learning -------------------------------------------------------------------------------------------------------
