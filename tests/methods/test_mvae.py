"""mvae against its formulas: the product of experts, the ELBO of every subset, and what a prediction may know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from imgshared.build import build_method
from imgshared.config import MvaeConfig
from imgshared.data.panel import Panel
from imgshared.methods.mvae import Mvae, random_subsets
from imgshared.types import Batch, InputError

PANEL = Panel(("P0", "DNA", "P2", "P3"), "DNA")
SMALL = MvaeConfig(channels=(4, 6), latent_dim=5, marker_dim=3, epochs=2, subsets=0)


def make(**changes: Any) -> tuple[Mvae, Batch]:
    torch.manual_seed(0)
    method = build_method(replace(SMALL, **changes), PANEL, 16)
    assert isinstance(method, Mvae)
    measured = torch.rand(8, 4) < 0.6
    measured[:, 1] = torch.arange(8) % 4 > 0
    measured[0] = torch.tensor([1, 0, 0, 1])
    batch = Batch(torch.arange(8), torch.rand(8, 4, 16, 16) * measured[..., None, None], measured)
    method.prepare(measured, seed=0)
    method.start(method.stages[0])
    method.progress = 1.0
    return method, batch


def expert(method: Mvae, batch: Batch, cell: int, channel: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance by the encoder of one stain."""
    protein = channel != 1
    condition = method.marker.weight[[channel]] if protein else None
    said, _ = method.encoders["protein" if protein else "chromatin"](batch.images[[cell], channel, None], condition)
    mean, log_std = said.detach().double().numpy()[0].reshape(2, -1)
    return mean, np.exp(2 * 6 * np.tanh(log_std / 6))


def posterior(method: Mvae, batch: Batch, cell: int, channels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Multiply densities on a grid a dimension, prior included: no formula of a product."""
    grid = np.linspace(-6, 6, 24001)
    log_density = np.tile(-0.5 * grid**2, (5, 1))
    for channel in channels:
        mean, var = expert(method, batch, cell, channel)
        log_density += -0.5 * (grid - mean[:, None]) ** 2 / var[:, None]
    density = np.exp(log_density - log_density.max(1, keepdims=True))
    density /= density.sum(1, keepdims=True)
    mean = density @ grid
    return mean, density @ grid**2 - mean**2


def shown(measured: torch.Tensor, cell: int) -> list[int]:
    return measured[cell].nonzero()[:, 0].tolist()


def test_the_product_of_experts_is_a_product_of_densities() -> None:
    method, batch = make()
    method.eval()
    latents = method.encode(batch.images, batch.measured)
    for cell in range(8):
        mean, _ = posterior(method, batch, cell, shown(batch.measured, cell))
        np.testing.assert_allclose(latents.shared[cell].detach(), mean, atol=1e-4)
        for channel in range(4):
            mean, _ = posterior(method, batch, cell, [channel])
            mean = mean if batch.measured[cell, channel] else np.zeros(5)
            np.testing.assert_allclose(latents.each[cell, channel].detach(), mean, atol=1e-4)
    assert latents.specific.shape == (8, 4, 0)


def test_cells_of_which_none_shows_chromatin_and_another_stain_are_refused() -> None:
    method, _ = make()
    apart = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    with pytest.raises(InputError, match=r"mvae learns .* no training cell does: .*configs/translator_unpaired\.yaml"):
        method.prepare(apart, seed=0)


def test_a_held_out_batch_without_stains_does_not_count() -> None:
    method, batch = make()
    assert method.validate(batch).count is None
    nothing = method.validate(replace(batch, measured=torch.zeros_like(batch.measured)))
    assert nothing.count == 0
    assert nothing.total == 0


@pytest.mark.parametrize("likelihood", ["bce", "mse"])
def test_the_loss_is_the_elbo_of_all_stains_and_of_each_alone(likelihood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = make(likelihood=likelihood, beta=0.7)
    method.eval()  # so that a stain can be decoded by itself
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
    terms = method.loss(batch, "generator")
    wanted = {"chromatin": 0.0, "protein": 0.0, "kl": 0.0}
    for cell in range(8):
        every = shown(batch.measured, cell)
        for subset in [every, *([c] for c in every)]:
            mean, var = posterior(method, batch, cell, subset)
            z = torch.tensor(mean + 0.3 * np.sqrt(var), dtype=torch.float32)[None]
            for channel in subset:  # the stains in the subset, and no other
                name = "chromatin" if channel == 1 else "protein"
                condition = None if channel == 1 else method.marker.weight[[channel]]
                p = torch.sigmoid(method.decoders[name](z, condition))[0, 0]
                x = batch.images[cell, channel]
                error = (x - p) ** 2 if likelihood == "mse" else -(x * p.log() + (1 - x) * (1 - p).log())
                wanted[name] += error.mean().item() / 8
            wanted["kl"] += 0.7 * 0.5 * (mean**2 + var - 1 - np.log(var)).sum() / 16**2 / 8
    for name, value in wanted.items():
        assert terms.parts[name].item() == pytest.approx(value, rel=1e-3), name
    assert terms.total.item() == pytest.approx(sum(wanted.values()), rel=1e-3)
    assert method.validate(batch).total.item() == pytest.approx(terms.total.item(), rel=1e-5)


def test_random_subsets_have_two_stains_or_more_but_not_all() -> None:
    torch.manual_seed(0)
    measured = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    seen: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set()}
    sizes = []
    for _ in range(400):
        cells, masks = random_subsets(measured)
        assert cells.tolist() == [0, 1]
        assert not (masks & ~measured[cells]).any()
        for cell, mask in zip(cells.tolist(), masks, strict=True):
            seen[cell].add(tuple(mask.nonzero()[:, 0].tolist()))
        sizes.append(int(masks[0].sum()))
    assert len(seen[0]) == 10 + 10 + 5
    assert seen[1] == {(0, 2), (0, 3), (2, 3)}
    assert np.bincount(sizes)[2:] / 400 == pytest.approx([1 / 3] * 3, abs=0.08)


def test_random_subsets_add_terms() -> None:
    method, batch = make(subsets=3)
    without, _ = make()
    method.eval()
    without.eval()
    assert method.loss(batch, "generator").total > without.loss(batch, "generator").total + 0.5


def test_beta_rises_from_zero() -> None:
    method, _ = make(beta=2.0, anneal=0.25)
    for progress, beta in ((0.0, 0.0), (0.125, 1.0), (0.25, 2.0), (0.9, 2.0)):
        method.progress = progress
        assert method.beta == pytest.approx(beta)
    method, batch = make(anneal=0.0)
    method.progress = 0.0
    assert method.beta == 1.0
    method, batch = make(anneal=0.5)
    method.progress = 0.0
    assert method.loss(batch, "generator").parts["kl"] == 0
    assert method.validate(batch).parts["kl"] > 0  # epochs can be compared


def test_any_measured_subset_predicts_any_stain_and_nothing_else_is_known() -> None:
    method, batch = make()
    method.eval()
    given = torch.zeros_like(batch.measured)
    given[:, 1], given[:, 3] = batch.measured[:, 1], True
    given &= batch.measured
    predicted = method.translate(batch.images, given, range(4)).mean
    assert predicted.shape == (8, 4, 16, 16)
    assert ((predicted >= 0) & (predicted <= 1)).all()
    other = torch.where(given[..., None, None], batch.images, torch.rand(8, 4, 16, 16))
    assert torch.equal(predicted, method.translate(other, given, range(4)).mean)
    assert not torch.equal(predicted[:, 0], predicted[:, 2])  # the marker's embedding matters
    z = method.encode(batch.images, given).shared
    torch.testing.assert_close(predicted[:, 1:2], torch.sigmoid(method.decoders["chromatin"](z)))
    torch.testing.assert_close(method.translate(batch.images, given, [2, 1]).mean, predicted[:, [2, 1]])


def test_each_stain_is_rebuilt_from_itself() -> None:
    method, batch = make()
    method.eval()
    rebuilt = method.reconstruct(batch.images, batch.measured, specific=True)
    assert not rebuilt[~batch.measured].any()
    assert torch.equal(rebuilt, method.reconstruct(batch.images, batch.measured, specific=False))
    for channel in range(4):
        alone = batch.measured & (torch.arange(4) == channel)
        rows = batch.measured[:, channel]
        want = method.translate(batch.images, alone, [channel]).mean[rows, 0]
        torch.testing.assert_close(rebuilt[rows, channel], want)


def test_proteins_per_step_spares_proteins() -> None:
    method, batch = make(proteins_per_step=1, subsets=1)
    calls: list[int] = []
    method.encoders["protein"].register_forward_hook(lambda m, i, o: calls.append(len(i[0])))
    method.loss(batch, "generator")
    assert calls == [int(batch.measured[:, [0, 2, 3]].any(1).sum())]


def test_it_learns_and_says_how_many_dimensions_it_uses() -> None:
    method, batch = make(beta=0.01, subsets=1)
    optimizer = torch.optim.Adam(method.stages[0].groups["generator"][0].parameters, lr=1e-2)
    images = torch.linspace(0, 1, 8)[:, None, None, None].expand(8, 4, 16, 16) * batch.measured[..., None, None]
    batch = Batch(batch.index, images, batch.measured)
    log = []
    for _ in range(60):
        terms = method.loss(batch, "generator")
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        log.append({"total": terms.total.item()} | {k: v.item() for k, v in terms.parts.items()})
    assert log[-1]["total"] < 0.85 * log[0]["total"]
    assert log[-1]["total"] == pytest.approx(sum(log[-1][k] for k in ("chromatin", "protein", "kl")), rel=1e-5)
    assert 1 <= log[-1]["active_dimensions"] <= 5
    assert method.signs(log[-1]) == []


def test_a_collapsed_posterior_is_reported() -> None:
    method, batch = make()
    with torch.no_grad():
        for encoder in method.encoders.values():
            encoder.shared_head.weight.zero_()
            encoder.shared_head.bias.copy_(torch.tensor([0.0] * 5 + [6.0] * 5))  # wide experts say nothing
    active = method.loss(batch, "generator").parts["active_dimensions"]
    assert active == 0
    (sentence,) = method.signs({"active_dimensions": active.item()})
    assert "information (0 of 5): posterior collapse; lower method.beta" in sentence
    assert method.signs({}) == []


def test_a_collapsed_expert_is_seen_though_the_other_tells_enough() -> None:
    """Predictions start from chromatin alone: all stains together may look well meanwhile."""
    method, batch = make()
    with torch.no_grad():
        silent = method.encoders["chromatin"].shared_head
        silent.weight.zero_()
        silent.bias.copy_(torch.tensor([0.0] * 5 + [6.0] * 5))
    parts = {name: value.item() for name, value in method.loss(batch, "generator").parts.items()}
    assert parts["chromatin/active_dimensions"] == 0
    assert parts["chromatin/kl_high"] < 0.01
    assert parts["protein/active_dimensions"] == parts["active_dimensions"] == 5
    (sentence,) = method.signs(parts)
    assert "of chromatin alone (0 of 5): posterior collapse" in sentence


def test_the_kl_of_each_dimension_is_watched_given_one_stain() -> None:
    method, batch = make()
    method.eval()
    parts = method.loss(batch, "generator").parts
    assert "kl_median" in parts
    for modality, channels in (("chromatin", [1]), ("protein", [0, 2, 3])):
        stains = [(cell, c) for cell in range(8) for c in channels if batch.measured[cell, c]]
        said = [posterior(method, batch, cell, [c]) for cell, c in stains]
        means, variances = (np.stack(part) for part in zip(*said, strict=True))
        kl = 0.5 * (means**2 + variances - 1 - np.log(variances)).mean(0)
        for name, share in (("kl_low", 0.1), ("kl_median", 0.5), ("kl_high", 0.9)):
            assert parts[f"{modality}/{name}"].item() == pytest.approx(np.quantile(kl, share), rel=1e-2, abs=1e-4)
        assert parts[f"{modality}/active_dimensions"] == (kl > 0.01).sum()


def test_what_a_batch_does_not_show_is_not_watched() -> None:
    method, batch = make()
    only = batch.measured & (torch.arange(4) == 1)
    parts = method.loss(replace(batch, measured=only), "generator").parts
    assert "chromatin/active_dimensions" in parts
    assert not [name for name in parts if name.startswith("protein/")]


def test_an_expert_far_out_gives_no_infinity() -> None:
    method, batch = make()
    with torch.no_grad():
        for encoder in method.encoders.values():
            encoder.shared_head.bias[5:] = torch.tensor([-1e4, 1e4, -1e4, 1e4, 0])
    loss = method.loss(batch, "generator").total
    loss.backward()
    assert loss.isfinite()


def test_crops_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"crops of 16 px cannot be halved 5 times.*method.channels"):
        make(channels=(4,) * 5)
