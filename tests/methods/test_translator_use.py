"""What the translator may know, what it refuses, and that it learns: from pairs, from a partner, without pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imgshared.config import TranslatorConfig, TranslatorWeights
from imgshared.data.panel import Panel
from imgshared.methods.translator import Translator
from imgshared.models.translation import Maps
from imgshared.types import Batch, InputError

DNA = 1
UNPAIRED = torch.zeros(16, 2, dtype=torch.bool)
UNPAIRED[:8, DNA] = UNPAIRED[8:, 0] = True
OFF = TranslatorWeights(**{f.name: 0.0 for f in fields(TranslatorWeights)})
SMALL = TranslatorConfig(
    channels=(4, 6), shared_fraction=0.5, marker_dim=3, discriminator_channels=(4, 5), discriminator_sees_source=False
)


def weighing(**weights: float) -> dict[str, TranslatorWeights]:
    return {"weights": replace(OFF, **weights)}


def make(
    settings: dict[str, Any] | None = None,
    *,
    measured: Tensor | None = None,
    side: int | tuple[int, int] = 16,
    seed: int = 0,
) -> tuple[Translator, Batch]:
    torch.manual_seed(seed)
    if measured is None:
        measured = torch.rand(10, 3) < 0.6
        measured[:, DNA] = True
    markers = ("P0", "DNA", "P2")[: measured.shape[1]]
    size = (side, side) if isinstance(side, int) else side
    method = Translator(replace(SMALL, **settings or {}), panel=Panel(markers, "DNA"), crop_px=size[0])
    with torch.no_grad():
        for parameter in method.parameters():  # those that start at zero too
            parameter.normal_(0, 0.8 / max(parameter[0].numel(), 4) ** 0.5)
    images = torch.rand(*measured.shape, *size)
    images[~measured] = torch.nan  # nothing may ever read them
    method.prepare(measured, seed=0)
    method.start(method.stages[0])
    method.turn("generator")
    method.eval()
    return method, Batch(torch.arange(len(measured)), images, measured)


def with_other(batch: Batch, channels: Sequence[int]) -> Batch:
    """Other pixels in some channels, where measured."""
    images = batch.images.clone()
    images[:, channels] = torch.where(
        batch.measured[:, channels, None, None], torch.rand_like(images[:, channels]), torch.nan
    )
    return replace(batch, images=images)


# --- what it may know -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"fusion": "product", "head": "laplace"}, {"encoders": "marker"}])
def test_a_prediction_knows_its_sources_alone(settings: dict[str, str]) -> None:
    method, batch = make(settings)
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


def test_any_subset_predicts_any_other_stain_and_listens_to_all_of_it() -> None:
    method, batch = make(measured=torch.ones(4, 3, dtype=torch.bool))
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


def test_cells_of_one_batch_may_show_different_stains() -> None:
    method, batch = make()
    method.eval()
    together = method.translate(batch.images, batch.measured, [2, 0]).mean
    for i in range(10):
        alone = method.translate(batch.images[i : i + 1], batch.measured[i : i + 1], [2, 0]).mean
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_latents_of_a_stain_come_from_that_stain_and_the_fused_one_from_all() -> None:
    method, batch = make()
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


def test_a_stain_is_rebuilt_from_itself_alone() -> None:
    method, batch = make()
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


def test_what_is_hidden_in_training_does_not_help() -> None:
    everything = dict.fromkeys(("full", "shared", "norm", "identity", "cycle", "patch_nce", "adversarial"), 1.0)
    for more in ({}, {"agreement": 1.0, "independence": 1.0}):  # the last two do look at hidden stains
        method, batch = make({**weighing(**everything, **more), "chromatin_only": 1.0})
        parts = []
        for same in (batch, with_other(batch, [0, 2])):
            torch.manual_seed(5)
            parts.append(method.loss(same, "generator").parts)
        one, other = parts
        for name in everything:
            if name != "norm" or not more:  # it weighs all that is encoded
                assert one[name].item() == other[name].item(), name


def test_noise_is_of_training_alone() -> None:
    for settings in ({"latent_noise": 0.5}, {"fusion": "product"}):
        method, batch = make({**settings, **weighing(shared=1.0), "chromatin_only": 1.0})
        losses = {method.loss(batch, "generator").total.item() for _ in range(3)}
        assert len(losses) == 3
        method.eval()
        first, again = (method.translate(batch.images, batch.measured, [0]).mean for _ in range(2))
        assert torch.equal(first, again)


def test_a_few_of_the_hidden_stains_are_predicted_in_a_step() -> None:
    method, batch = make({**weighing(cross=1.0), "hidden_proteins": 1, "chromatin_only": 1.0})
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


def test_keys_of_patch_nce_carry_no_gradient() -> None:
    method, batch = make(weighing(patch_nce=1.0))
    step = method._begin(batch)
    source = step.stains.first_visible(len(batch.index))
    again = Maps([torch.randn(len(source), *h.shape[1:]) for h in step.maps.shared])
    method._patch_nce(step, again, source).backward()
    assert not any(p.grad is not None for p in method.network.parameters())
    assert method.projection is not None
    assert all(p.grad is not None for p in method.projection.parameters())


# --- sizes, heads, backbones ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mean", "laplace", "gaussian"])
def test_a_predicted_scale_is_a_standard_deviation(head: str) -> None:
    method, batch = make({"head": head})
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
def test_crops_of_any_size_train_and_predict(backbone: str, side: int | tuple[int, int]) -> None:
    terms = ("full", "shared", "cross", "identity", "agreement", "adversarial", "patch_nce", "cycle")
    method, batch = make(
        {"backbone": backbone, "channels": (4, 6, 8), **weighing(**dict.fromkeys(terms, 1.0))}, side=side
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
        ({"discriminator_channels": (4,) * 4, **weighing(adversarial=1.0)}, 16, "patches of 70 px, larger than"),
        ({"backbone": "resnet10x"}, 16, "method.backbone: timm knows no model 'resnet10x'. Did you mean 'resnet10t'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(settings: dict[str, Any], side: int, said: str) -> None:
    with pytest.raises(InputError) as refused:
        make(settings, side=side)
    assert said in str(refused.value)


def test_the_discriminator_that_sees_the_source_is_shown_cells_with_chromatin() -> None:
    measured = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    measured[measured[:, DNA], 2] = False  # never with chromatin: no pair shows what it should look like
    measured[~measured.any(1), 0] = True
    for seed in range(5):
        method, batch = make(
            {**weighing(adversarial=1.0), "discriminator_sees_source": True}, measured=measured, seed=seed
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


def test_a_discriminator_that_sees_the_source_keeps_no_stain_from_patch_contrast_and_cycle() -> None:
    measured = torch.tensor([[True, True, False]] * 4 + [[False, False, True]] * 4)  # P2 never meets chromatin
    terms = {"full": 1.0, "patch_nce": 1.0, "cycle": 1.0}
    method, batch = make({**weighing(**terms), "discriminator_sees_source": True}, measured=measured)
    assert set(method.loss(batch, "generator").parts) == set(terms)  # there is no discriminator to see anything
    method, batch = make({**weighing(**terms, adversarial=1.0), "discriminator_sees_source": True}, measured=measured)
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


def test_a_discriminator_that_has_won_is_said() -> None:
    method, _ = make()
    assert method.signs({"discriminator/accuracy": 0.9}) == method.signs({}) == []
    (said,) = method.signs({"discriminator/accuracy": 1.0})
    assert "lr_discriminator" in said


def test_a_discriminator_that_never_moves_is_said_once_it_should() -> None:
    method, _ = make({**weighing(adversarial=1.0), "translation_from": 0.5})
    method.progress = 0.4
    assert method.signs({"full": 0.1}) == []
    method.progress = 0.6
    (said,) = method.signs({"full": 0.1})
    assert said.startswith("the discriminator had no step")
    assert method.signs({"discriminator/accuracy": 0.9}) == []
    without, _ = make(weighing(cross=1.0))
    without.progress = 0.6
    assert without.signs({"full": 0.1}) == []


def test_dependence_that_is_never_estimated_is_said() -> None:
    method, _ = make(weighing(full=1.0, independence=1.0))
    assert method.signs({"independence": 0.01}) == []
    (said,) = method.signs({"independence": 0.0})
    assert "no stain is shown by 8 cells of a step" in said
    assert make()[0].signs({"independence": 0.0}) == []


@torch.no_grad()
def test_cells_without_any_stain_have_the_latents_of_none() -> None:
    method, batch = make()
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


def learn(method: Translator, batch: Batch, steps: int, size: int = 32, lr: float = 4e-3) -> list[dict[str, float]]:
    """The loop in short."""
    stage = method.stages[0]
    method.start(stage)
    optimizers = {
        p: torch.optim.Adam([x for g in groups for x in g.parameters], lr) for p, groups in stage.groups.items()
    }
    log = []
    for _ in range(steps):
        rows = torch.randperm(len(batch.index))[:size]
        part = Batch(batch.index[rows], batch.images[rows], batch.measured[rows])
        log.append({})
        for player, optimizer in optimizers.items():
            method.turn(player)
            terms = method.loss(part, player)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            log[-1] |= {f"{player}/{name}": value.item() for name, value in terms.parts.items()}
    method.eval()
    return log


def test_it_learns_from_cells_that_were_never_stained_together() -> None:
    weights = weighing(full=1.0, patch_nce=0.1, adversarial=0.1, cycle=1.0, identity=1.0, r1=0.1)
    method, batch = make(weights, measured=UNPAIRED, seed=1)  # a start far off
    assert not method.stages[0].monitored
    log = learn(method, batch, 40, size=16, lr=6e-3)
    assert all(set(step) == set(log[0]) for step in log)
    assert {"generator/adversarial", "generator/patch_nce", "discriminator/r1"} < set(log[0])
    for name in ("full", "cycle", "identity", "patch_nce"):
        first, last = (sum(step[f"generator/{name}"] for step in part) for part in (log[:5], log[-5:]))
        assert last < (1.0 if name == "patch_nce" else 0.7) * first, name
    assert set(method.validate(batch).parts) == {"full"}
    for source in (0, DNA):
        rows = UNPAIRED[:, source]
        predicted = method.translate(batch.images[rows], UNPAIRED[rows], [1 - source]).mean
        assert predicted.isfinite().all()


def toy(n: int, seed: int) -> Tensor:
    """DNA: a few blobs; P0: half of its blur and bright spots at random places; P2: a copy of P0."""
    g = torch.Generator().manual_seed(seed)

    def spots(count: int, width: float) -> Tensor:
        y, x = (torch.rand(n, count, 1, 1, generator=g) * 12 + 2 for _ in range(2))
        at = torch.arange(16.0)
        return torch.exp(-((at[:, None] - y) ** 2 + (at - x) ** 2) / (2 * width**2)).sum(1)

    dna = spots(3, 1.5).clamp_max(1)
    blur = F.avg_pool2d(dna[:, None], 3, 1, 1)[:, 0]
    protein = 0.5 * blur + 0.8 * spots(1, 1.0)
    return torch.stack([protein, dna, protein], 1)


def taught(measured: Tensor, **settings: Any) -> tuple[Translator, Tensor]:
    """A translator that learnt from toy cells of these stains, and the mean of what they are in truth."""
    torch.manual_seed(0)
    method = Translator(
        TranslatorConfig(channels=(12, 16), marker_dim=4, **settings),
        panel=Panel(("P0", "DNA", "P2"), "DNA"),
        crop_px=16,
    )
    train = toy(len(measured), 0)
    method.prepare(measured, 0)
    seen = torch.where(measured[..., None, None], train, torch.nan)
    learn(method, Batch(torch.arange(len(measured)), seen, measured), 150, lr=6e-3)
    return method, train.mean(0)


def error_of(method: Translator, test: Tensor, target: int, *sources: int) -> float:
    """Mean squared error of a stain predicted from others."""
    given = torch.zeros(test.shape[:2], dtype=torch.bool)
    given[:, list(sources)] = True
    with torch.no_grad():
        return (method.translate(test, given, [target]).mean - test[:, target, None]).square().mean().item()


@pytest.mark.parametrize("settings", [{}, {"fusion": "product", "encoders": "marker"}])
def test_it_predicts_what_can_be_known_and_more_from_an_informative_partner(settings: dict[str, str]) -> None:
    method, means = taught(torch.ones(256, 3, dtype=torch.bool), **settings)
    test = toy(100, 1)
    error = partial(error_of, method, test, 2)
    picture = (means[2] - test[:, 2]).square().mean().item()
    spots = test[:, 2] - 0.5 * F.avg_pool2d(test[:, DNA, None], 3, 1, 1)[:, 0]
    unknowable = spots.var(0).mean().item()  # from DNA
    assert 0.9 * unknowable < error(DNA) < 0.6 * picture
    assert error(DNA) < unknowable + 0.25 * (picture - unknowable)
    assert error(DNA, 0) < 0.7 * error(DNA)
    assert error(0) < 0.4 * error(DNA)
    z = method.encode(test, torch.ones(100, 3, dtype=torch.bool))
    assert torch.equal(z.shared, method.network.pool(method._fused(test, z.measured)[1].shared, (16, 16)))


def test_two_panels_that_share_no_protein_complete_each_other() -> None:
    measured = torch.ones(256, 3, dtype=torch.bool)
    measured[:128, 2] = measured[128:, 0] = False
    method, means = taught(measured)
    test = toy(100, 1)
    for own, other in ((0, 2), (2, 0)):
        picture = (means[other] - test[:, other]).square().mean().item()
        assert error_of(method, test, other, DNA) < 0.6 * picture
        # What the other panel shows beside DNA was never seen with this stain: it may help, it must not harm.
        assert error_of(method, test, other, DNA, own) < 1.05 * error_of(method, test, other, DNA)
