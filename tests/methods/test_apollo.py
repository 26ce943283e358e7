"""apollo against its formulas: what each stage minimises, what it moves, and what a prediction may know."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from imgshared.build import build_method
from imgshared.config import ApolloConfig, Experiment, load
from imgshared.data.panel import Panel
from imgshared.methods.apollo import Apollo
from imgshared.types import Batch, InputError

SMALL = ApolloConfig(
    channels=(8, 16, 12),
    shared_channels=8,
    shared_dim=6,
    specific_dim=4,
    marker_dim=5,
    latent_epochs=2,
    encoder_epochs=2,
)


def make(config: ApolloConfig = SMALL, cells: int = 10) -> tuple[Apollo, Batch]:
    torch.manual_seed(0)
    method = Apollo(config, markers=4, chromatin=1, crop_px=16)
    measured = torch.rand(cells, 4) < 0.6
    measured[:, 1] = True
    images = torch.rand(cells, 4, 16, 16) * measured[..., None, None]
    method.prepare(measured, seed=3)
    return method, Batch(torch.arange(cells), images, measured)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_stage_1_minimises_the_papers_sum(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = make(replace(SMALL, latent_noise=noise, norm_weight=0.5))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
    e = 0.3 * noise  # in every latent that is decoded, in none whose norm is taken
    method.start(method.stages[0])
    loss = method.loss(batch, "generator").total
    z_s = method.tables["shared"].values
    slot = torch.full((10, 4), -1, dtype=torch.long)
    slot[batch.measured] = torch.arange(int(batch.measured.sum()))
    want = 0.5 * z_s.norm(dim=1).mean() / 6
    for name, channels in (("chromatin", [1]), ("protein", [0, 2, 3])):
        pairs = [(i, c) for i in range(10) for c in range(4) if c in channels and batch.measured[i, c]]
        i, c = (torch.tensor(v) for v in zip(*pairs, strict=True))
        x, zs, zm = batch.images[i, c, None], z_s[i], method.tables["specific"].values[slot[i, c]]
        condition = [method.marker.weight[c]] if name == "protein" else []
        full = method.decoders[name](torch.cat([zs + e, zm + e, *condition], 1))
        shared = method.shared_decoders[name](torch.cat([zs + e, *condition], 1))
        for logits in (full, shared):
            p = torch.sigmoid(logits)
            want = want - (x * p.log() + (1 - x) * (1 - p).log()).mean()
        want = want + 0.5 * zm.norm(dim=1).mean() / 4
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)


def test_stage_2_regresses_the_learnt_latents() -> None:
    method, batch = make()
    method.start(method.stages[1])
    terms = method.loss(batch, "generator").parts
    z_s, z_c = method.encoders["chromatin"](batch.images[:, 1:2])
    assert terms["chromatin/z_shared"].item() == pytest.approx(
        F.mse_loss(z_s, method.tables["shared"].values).item(), rel=1e-4
    )
    rows = batch.measured.flatten().cumsum(0).reshape(10, 4)[:, 1] - 1
    want = F.mse_loss(z_c, method.tables["specific"].values[rows])
    assert terms["chromatin/z_specific"].item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize(("stage", "moving"), [(0, ("decoders", "shared_decoders", "marker")), (1, ("encoders",))])
def test_each_stage_moves_its_own_networks_alone(stage: int, moving: tuple[str, ...]) -> None:
    method, batch = make()
    method.start(method.stages[stage])
    before = {k: v.clone() for k, v in method.state_dict().items()}
    latents = method.tables["shared"].values.clone()
    group = method.stages[stage].groups["generator"][0]
    optimizer = torch.optim.Adam(group.parameters, lr=group.lr)
    method.loss(batch, "generator").total.backward()
    optimizer.step()
    for table, lr in method.stages[stage].tables:
        table.step(lr)
    for name, value in method.state_dict().items():
        if name.split(".")[0] not in moving:
            assert torch.equal(value, before[name]), name  # batch statistics included
    assert any(not torch.equal(v, before[k]) for k, v in method.state_dict().items() if k.split(".")[0] in moving)
    assert torch.equal(latents, method.tables["shared"].values) == (stage == 1)


def test_free_latents_begin_as_wide_as_asked() -> None:
    method, _ = make(replace(SMALL, latent_init_std=0.5), cells=400)
    for table in method.tables.values():
        assert table.values.std().item() == pytest.approx(0.5, rel=0.1)
        assert abs(table.values.mean().item()) < 0.05


def test_cells_outside_the_batch_keep_latents_and_moments() -> None:
    method, batch = make()
    method.start(method.stages[0])
    part = Batch(batch.index[:4], batch.images[:4], batch.measured[:4])
    before = method.tables["shared"].values.clone()
    method.loss(part, "generator").total.backward()
    for table, lr in method.stages[0].tables:
        table.step(lr)
    shared, specific = method.tables["shared"], method.tables["specific"]
    assert torch.equal(shared.values[4:], before[4:])
    assert not torch.equal(shared.values[:4], before[:4])
    seen = int(batch.measured[:4].sum())
    assert specific.second[:seen].gt(0).any(1).all()
    assert not specific.second[seen:].any()


def test_the_last_feature_map_is_split_by_channel() -> None:
    method, batch = make()
    encoder = method.encoders["chromatin"].eval()
    features: list[torch.Tensor] = []
    encoder.features.register_forward_hook(lambda m, i, o: features.append(o.retain_grad() or o))
    shared, specific = encoder(batch.images[:, 1:2])
    shared.sum().backward(retain_graph=True)
    assert features[0].grad is not None
    assert features[0].grad[:, :8].any()
    assert not features[0].grad[:, 8:].any()
    features[0].grad = None
    specific.sum().backward()
    assert not features[0].grad[:, :8].any()


def test_a_prediction_knows_its_sources_alone() -> None:
    method, batch = make()
    method.eval()
    only = torch.zeros_like(batch.measured)
    only[:, 1] = True
    predicted = method.translate(batch.images, only, range(4)).mean
    other = batch.images.clone()
    other[:, [0, 2, 3]] = torch.rand(10, 3, 16, 16)
    assert torch.equal(predicted, method.translate(other, only, range(4)).mean)
    assert not torch.equal(predicted[:, 0], predicted[:, 2])  # the marker's embedding matters


def test_any_measured_modality_or_both_encode_a_cell() -> None:
    method, batch = make()
    method.eval()
    both = method.encode(batch.images, batch.measured)
    for i in range(10):
        alone = [both.each[i, c] for c in range(4) if batch.measured[i, c]]
        torch.testing.assert_close(both.shared[i], torch.stack(alone).mean(0))
    assert not both.specific[~batch.measured].any()
    protein = torch.zeros_like(batch.measured)
    protein[:, 2] = batch.measured[:, 2]
    rows = protein[:, 2]
    torch.testing.assert_close(method.encode(batch.images, protein).shared[rows], both.each[rows, 2])


def test_proteins_per_step_draws_measured_stains() -> None:
    method, batch = make()
    drawn = torch.zeros_like(batch.measured)
    for _ in range(50):
        stains = {s.modality: s for s in method._stains(batch.measured, 1)}
        protein = stains["protein"]
        assert len(protein.cells) == len(protein.cells.unique())
        assert batch.measured[protein.cells, protein.channels].all()
        drawn[protein.cells, protein.channels] = True
    drawn[:, 1] = True
    assert torch.equal(drawn, batch.measured)  # in time every stain is drawn


def test_validation_prefers_the_better_prediction() -> None:
    method, batch = make()
    method.eval()
    terms = method.validate(batch)
    assert set(terms.parts) == {"chromatin/full", "protein/full", "protein/predicted"}
    assert terms.total.item() == pytest.approx(sum(v.item() for v in terms.parts.values()), rel=1e-5)
    shown = method.translate(batch.images, torch.arange(4) == torch.ones(10, 1), range(4)).mean.detach()
    easy = Batch(batch.index, torch.where(batch.measured[..., None, None], shown, batch.images), batch.measured)
    easy.images[:, 1] = batch.images[:, 1]
    assert method.validate(easy).parts["protein/predicted"] < terms.parts["protein/predicted"]


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"specific_dim": 0}, "z_specific"),
        ({"shared_decoders": False}, "chromatin/shared"),
        ({"one_step": True}, "norm"),
        ({"likelihood": "mse"}, "kl"),
    ],
)
def test_ablations_train_and_predict(change: dict[str, object], missing: str) -> None:
    method, batch = make(replace(SMALL, **change))  # type: ignore[arg-type]
    seen: set[str] = set()
    for stage in method.stages:
        method.start(stage)
        group = stage.groups["generator"][0]
        optimizer = torch.optim.Adam(group.parameters, lr=5e-3)
        losses = []
        for _ in range(30):
            terms = method.loss(batch, "generator")
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            for table, _ in stage.tables:
                table.step(0.05)
            losses.append(terms.total.item())
            seen |= set(terms.parts)
        assert sum(losses[-5:]) < sum(losses[:5])
    assert not any(missing in name for name in seen)
    method.eval()
    out = method.translate(batch.images, batch.measured, [0, 3]).mean
    assert out.shape == (10, 2, 16, 16)
    assert ((out >= 0) & (out <= 1)).all()
    rebuilt = method.reconstruct(batch.images, batch.measured, specific=True)
    assert not rebuilt[~batch.measured].any()


def test_a_held_out_batch_without_stains_does_not_count() -> None:
    method, batch = make()
    nothing = method.validate(replace(batch, measured=torch.zeros_like(batch.measured)))
    assert (nothing.count, nothing.total) == (0, 0)


def test_what_is_predicted_from_chromatin_is_judged_of_cells_that_show_it() -> None:
    method, batch = make()
    method.eval()
    with_it, without = (
        Batch(batch.index, batch.images, batch.measured & kept)
        for kept in (torch.arange(10)[:, None] < 6, torch.arange(4) != 1)
    )
    mixed = replace(batch, measured=torch.where(torch.arange(10)[:, None] < 6, with_it.measured, without.measured))
    own = method.validate(with_it).parts["protein/predicted"]
    assert method.validate(mixed).parts["protein/predicted"].item() == pytest.approx(own.item(), rel=1e-5)
    assert "protein/predicted" not in method.validate(without).parts


@pytest.mark.parametrize("one_step", [False, True])
def test_cells_of_which_none_shows_chromatin_and_another_stain_are_refused(one_step: bool) -> None:
    method, batch = make(replace(SMALL, one_step=one_step))
    with pytest.raises(InputError, match=r"apollo learns .* no training cell does: .*translator_unpaired\.yaml"):
        method.prepare(batch.measured & (torch.arange(4) != 1), seed=0)


@pytest.mark.parametrize("likelihood", ["bce", "mse"])
def test_one_step_is_an_autoencoder_a_stain_whose_shared_means_agree(
    likelihood: Literal["bce", "mse"], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = make(replace(SMALL, one_step=True, match_weight=0.4, kl_weight=0.7, likelihood=likelihood))
    method.start(method.stages[0])
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
    parts = method.loss(batch, "generator").parts
    want = dict.fromkeys(parts, 0.0)
    means: list[tuple[int, torch.Tensor]] = []
    for name, channels in (("chromatin", [1]), ("protein", [0, 2, 3])):
        pairs = [(i, c) for i in range(10) for c in range(4) if c in channels and batch.measured[i, c]]
        i, c = (torch.tensor(v) for v in zip(*pairs, strict=True))
        x, condition = batch.images[i, c, None], [method.marker.weight[c]] if name == "protein" else []
        (mean_s, log_s), (mean_m, log_m) = (o.chunk(2, 1) for o in method.encoders[name](x, *condition))
        z_s, z_m = mean_s + 0.3 * log_s.exp(), mean_m + 0.3 * log_m.exp()
        full = method.decoders[name](torch.cat([z_s, z_m], 1), *condition)
        shared = method.shared_decoders[name](z_s, *condition)
        for kind, logits in (("full", full), ("shared", shared)):
            p = torch.sigmoid(logits)
            error = (p - x).square() if likelihood == "mse" else -(x * p.log() + (1 - x) * (1 - p).log())
            want[f"{name}/{kind}"] = error.mean().item()
        own = Normal(torch.cat([mean_s, mean_m], 1), torch.cat([log_s, log_m], 1).exp())
        want["kl"] += 0.7 * kl_divergence(own, Normal(0.0, 1.0)).mean().item()
        means += zip(i.tolist(), mean_s, strict=True)
    centres = {cell: torch.stack([m for k, m in means if k == cell]).mean(0) for cell in range(10)}
    want["match"] = 0.4 * torch.stack([(m - centres[k]).square() for k, m in means]).mean().item()
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(want, rel=1e-4)


def test_one_step_pulls_the_stains_of_a_cell_together() -> None:
    method, batch = make(replace(SMALL, one_step=True, match_weight=100.0))
    stage = method.stages[0]
    method.start(stage)
    optimizer = torch.optim.Adam(stage.groups["generator"][0].parameters, lr=1e-2)
    first = method.loss(batch, "generator").parts["match"]
    for _ in range(40):
        optimizer.zero_grad()
        method.loss(batch, "generator").total.backward()
        optimizer.step()
    assert method.loss(batch, "generator").parts["match"] < 0.2 * first


def test_the_published_configuration_has_the_published_sizes(request: pytest.FixtureRequest) -> None:
    config = load(Experiment, request.config.rootpath / "configs" / "apollo_published.yaml").method
    method = Apollo(config, markers=3, chromatin=0, crop_px=128)
    convolutions = [m for m in method.encoders["protein"].features if isinstance(m, torch.nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size, c.stride) for c in convolutions] == [
        (n, (4, 4), (2, 2)) for n in (64, 128, 256, 256, 96)
    ]
    encoder = method.encoders["protein"]
    assert encoder.shared_head.in_features == 80 * 4 * 4 + 64
    assert encoder.specific_head.in_features == 16 * 4 * 4 + 64
    assert (encoder.shared_head.out_features, encoder.specific_head.out_features) == (1024, 200)
    assert method.decoders["protein"].expand[0].in_features == 1024 + 200 + 64
    assert method.shared_decoders["chromatin"].expand[0].in_features == 1024


@pytest.mark.parametrize("change", [{"one_step": True, "latent_noise": 0.5}, {"kl_weight": 1e-3}])
def test_a_setting_without_effect_is_refused(change: dict[str, object]) -> None:
    panel = Panel(("DNA", "P"), "DNA")
    with pytest.raises(InputError, match=f"method.{list(change)[-1]} has no effect"):
        build_method(replace(SMALL, encoder_epochs=30, latent_epochs=40, **change), panel, 16)  # type: ignore[arg-type]
