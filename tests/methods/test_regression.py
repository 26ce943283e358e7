"""regression: which pixels its loss counts, what it predicts, and what a prediction may know."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from imgshared.build import build_method
from imgshared.config import RegressionConfig
from imgshared.data.panel import Panel
from imgshared.methods.regression import Regression
from imgshared.types import Batch, InputError

PANEL = Panel(("P0", "DNA", "P2", "P3"), "DNA")
SMALL = RegressionConfig(channels=(4, 8), epochs=2)


def make(**changes: object) -> tuple[Regression, Batch]:
    torch.manual_seed(0)
    method = build_method(replace(SMALL, **changes), PANEL, 16)  # type: ignore[arg-type]
    assert isinstance(method, Regression)
    measured = torch.rand(10, 4) < 0.6
    measured[:, 1] = torch.arange(10) % 5 > 0
    batch = Batch(torch.arange(10), torch.rand(10, 4, 16, 16) * measured[..., None, None], measured)
    method.prepare(measured, seed=0)
    method.start(method.stages[0])
    return method, batch


def train(method: Regression, batch: Batch, steps: int) -> list[float]:
    (group,) = method.stages[0].groups["generator"]
    optimizer = torch.optim.Adam(group.parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = method.loss(batch, "generator").total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("error", ["l1", "l2", "laplace", "gaussian"])
def test_the_loss_counts_every_measured_target_of_the_cells_with_chromatin(error: str) -> None:
    method, batch = make(error=error)
    train(method, batch, 5)
    method.eval()
    predicted = method.translate(batch.images, batch.measured, [0, 2, 3])
    losses = []
    for cell in range(10):
        for t, target in enumerate([0, 2, 3]):
            if not (batch.measured[cell, 1] and batch.measured[cell, target]):
                continue
            off = batch.images[cell, target] - predicted.mean[cell, t]
            if error in ("l1", "l2"):
                assert predicted.scale is None
                losses.append(off.abs() if error == "l1" else off**2)
                continue
            assert predicted.scale is not None
            scale = predicted.scale[cell, t]
            density = (
                torch.distributions.Normal(0, scale)
                if error == "gaussian"
                else torch.distributions.Laplace(0, scale / math.sqrt(2))
            )
            losses.append(-density.log_prob(off))
    want = torch.stack(losses).mean().item()
    assert method.validate(batch).total.item() == pytest.approx(want, rel=1e-4)
    assert set(method.validate(batch).parts) == {error}
    assert method.validate(batch).count == len(losses)


@pytest.mark.parametrize("error", ["l2", "laplace"])
def test_it_learns(error: str) -> None:
    method, batch = make(error=error)
    images = batch.images.clone()
    images[:, 0], images[:, 2], images[:, 3] = images[:, 1] * 0.5, 1 - images[:, 1], images[:, 1] ** 2
    batch = Batch(batch.index, images * batch.measured[..., None, None], batch.measured)
    losses = train(method, batch, 60)
    assert losses[-1] < (0.2 * losses[0] if error == "l2" else losses[0] - 1)


def test_a_scale_tells_sure_pixels_from_unsure_ones() -> None:
    method, batch = make(error="gaussian")
    images = batch.images.clone()
    images[:, 1, :, :8], images[:, 1, :, 8:] = 0.0, 1.0
    images[:, 0] = images[:, 1] * torch.rand(10, 16, 16)  # known in the left half, random in the right one
    batch = Batch(batch.index, images * batch.measured[..., None, None], batch.measured)
    train(method, batch, 150)
    scale = method.eval().translate(batch.images, batch.measured, [0]).scale
    assert scale is not None
    sure, unsure = scale[batch.measured[:, 1], 0, 3:-3, 3:6], scale[batch.measured[:, 1], 0, 3:-3, 10:-3]
    assert unsure.mean().item() == pytest.approx(12**-0.5, rel=0.15)  # of a uniform distribution
    assert sure.mean() < 0.3 * unsure.mean()


def test_the_scale_is_bounded() -> None:
    method, batch = make(error="laplace")
    method.eval()
    with torch.no_grad():
        for bias, bound in ((-1e6, -6.0), (1e6, 2.0)):
            method.network.last.bias[3:] = bias
            scale = method.translate(batch.images, batch.measured, [0, 2, 3]).scale
            torch.testing.assert_close(scale, torch.full_like(scale, math.sqrt(2) * math.exp(bound)))


def test_a_batch_without_any_pair_moves_nothing() -> None:
    method, batch = make()
    measured = batch.measured & (torch.arange(4) == 1)
    loss = method.loss(Batch(batch.index, batch.images, measured), "generator")
    loss.total.backward()
    assert loss.total == 0
    assert not loss.parts
    assert loss.count == 0
    assert all(p.grad is not None and not p.grad.any() for p in method.parameters())


def test_cells_without_the_sources_leave_no_trace() -> None:
    """Neither in the gradient nor in the batch statistics."""
    method, batch = make()
    whole = batch.measured[:, 1]
    method.loss(batch, "generator").total.backward()
    grads = [p.grad.clone() for p in method.parameters() if p.grad is not None]
    statistics = [b.clone() for b in method.buffers()]
    other, _ = make()
    other.loss(Batch(batch.index[whole], batch.images[whole], batch.measured[whole]), "generator").total.backward()
    torch.testing.assert_close(grads, [p.grad for p in other.parameters()])
    torch.testing.assert_close(statistics, list(other.buffers()))


def test_a_prediction_knows_its_sources_alone() -> None:
    method, batch = make(sources=("DNA", "P2"))
    method.eval()
    before = method.translate(batch.images, batch.measured, range(4)).mean
    other = batch.images.clone()
    other[:, [0, 3]] = torch.rand(10, 2, 16, 16)
    other[~batch.measured] = 1
    assert torch.equal(before, method.translate(other, batch.measured, range(4)).mean)
    assert torch.equal(before[:, [1, 2]], batch.images[:, [1, 2]])  # a source is returned as it is
    other[:, 2] = torch.rand(10, 16, 16)
    assert not torch.equal(before[:, 0], method.translate(other, batch.measured, [0]).mean[:, 0])


def test_targets_come_in_the_order_asked() -> None:
    method, batch = make(error="gaussian")
    method.eval()
    whole = method.translate(batch.images, batch.measured, range(4))
    some = method.translate(batch.images, batch.measured, [3, 1, 0])
    assert torch.equal(some.mean, whole.mean[:, [3, 1, 0]])
    assert whole.scale is not None
    assert some.scale is not None
    assert torch.equal(some.scale, whole.scale[:, [3, 1, 0]])
    assert (some.scale > 0).all()


def test_odd_sizes_and_a_crop_inside_a_field() -> None:
    method, batch = make()
    train(method, batch, 3)
    method.eval()
    field, measured = torch.rand(1, 4, 51, 49), torch.ones(1, 4, dtype=torch.bool)
    whole = method.translate(field, measured, [0, 2]).mean
    assert whole.shape == (1, 2, 51, 49)
    crop = method.translate(field[..., 4:44, 6:46], measured, [0, 2]).mean
    torch.testing.assert_close(crop[..., 10:-10, 10:-10], whole[..., 14:34, 16:36], atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"method.channels: a U-Net of 5 levels needs crops of at least 32 px"):
        make(channels=(4,) * 5)
    method, batch = make()
    measured = batch.measured & (torch.arange(4) != 3)
    with pytest.raises(InputError, match="regression learns from cells that show DNA and P3 together"):
        method.prepare(measured, seed=0)
