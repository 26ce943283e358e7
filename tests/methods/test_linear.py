"""linear against scikit-learn: what it fits, on which cells, and what its predictions may know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import ndimage
from sklearn.linear_model import Ridge

from imgshared.build import build_method
from imgshared.config import LinearConfig
from imgshared.data.panel import Panel
from imgshared.methods.linear import Linear
from imgshared.types import Batch, InputError

PANEL = Panel(("P0", "DNA", "P2", "P3"), "DNA")
SIGMAS = (0, 1, 3)


def cells(n: int = 12, side: int = 16, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    measured = torch.rand(n, 4) < 0.6
    measured[:, 1] = torch.arange(n) % 6 > 0  # most cells show chromatin
    return Batch(torch.arange(n), torch.rand(n, 4, side, side) * measured[..., None, None], measured)


def make(**changes: object) -> Linear:
    config = LinearConfig(**({"sigmas": SIGMAS, "pixels": 1000} | changes))  # type: ignore[arg-type]
    method = build_method(config, PANEL, 16)
    assert isinstance(method, Linear)
    return method


def fit(method: Linear, batch: Batch, size: int = 5) -> list[float]:
    method.start(method.stages[0])
    method.prepare(batch.measured, seed=0)
    method.turn("closed form")
    parts = zip(*(part.split(size) for part in (batch.index, batch.images, batch.measured)), strict=True)
    return [method.loss(Batch(*part), "closed form").total.item() for part in parts]


def blurs(images: np.ndarray) -> np.ndarray:
    """(n, S, Y, X) to (n, Y, X, features) by scipy."""
    parts = [ndimage.gaussian_filter(images, (0, 0, s, s), mode="reflect") for s in SIGMAS]
    return np.concatenate(parts, 1).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("sources", [None, ("DNA", "P3")])
def test_it_is_scikit_learns_ridge_on_the_cells_that_show_both(sources: tuple[str, ...] | None) -> None:
    method, batch = make(sources=sources, ridge=1e-3), cells()
    fit(method, batch)
    assert method.sources == ((1,) if sources is None else (1, 3))
    predicted = method.translate(batch.images, batch.measured, range(4)).mean
    given = batch.images[:, list(method.sources)].double().numpy()
    for target in method.targets:
        rows = (batch.measured[:, [*method.sources, target]].all(1)).numpy()
        x = blurs(given[rows]).reshape(-1, len(method.sources) * len(SIGMAS))
        mean_square = np.append((x**2).mean(0), 1).mean()
        ridge = Ridge(1e-3 * mean_square * len(x)).fit(x, batch.images[rows, target].flatten().double())
        want = ridge.predict(blurs(given).reshape(-1, x.shape[1])).reshape(12, 16, 16)
        whole = batch.measured[:, list(method.sources)].all(1)
        np.testing.assert_allclose(predicted[whole, target], want[whole], atol=1e-5)


def test_batches_do_not_matter() -> None:
    one, many, batch = make(), make(), cells()
    fit(one, batch, 12)
    fit(many, batch, 1)  # of which some hold no pair
    torch.testing.assert_close(one.ridge.weights(), many.ridge.weights())


def test_the_logged_loss_is_that_of_the_fit_so_far() -> None:
    method, batch = make(), cells()
    (loss,) = fit(method, batch, 12)
    terms = method.validate(batch)
    assert loss == pytest.approx(terms.total.item(), rel=1e-4)
    assert terms.count == method.pairs(batch).shown.sum()
    without = Batch(batch.index, batch.images, torch.zeros_like(batch.measured))
    assert method.validate(without).count == 0


def test_a_batch_without_pairs_has_no_loss() -> None:
    """A loss of 0 would look like a perfect fit, from which the next batch runs away."""
    method, batch = make(), cells()
    fit(method, batch)
    before = method.ridge.xx.clone()
    for rows in (batch.measured & (torch.arange(4) == 1), torch.zeros_like(batch.measured)):
        terms = method.loss(Batch(batch.index, batch.images, rows), "closed form")
        assert (terms.count, terms.parts) == (0, {})
    none = Batch(batch.index[:0], batch.images[:0], batch.measured[:0])  # of the smaller last batch, on some rank
    assert method.loss(none, "closed form").count == 0
    assert torch.equal(method.ridge.xx, before)
    assert method.loss(batch, "closed form").count == 256 * method.pairs(batch).shown.sum()


def test_autocast_does_not_touch_the_fit() -> None:
    plain, mixed, batch = make(), make(), cells()
    fit(plain, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit(mixed, batch)
        predicted = mixed.translate(batch.images, batch.measured, [0]).mean
    assert torch.equal(plain.ridge.xx, mixed.ridge.xx)
    assert torch.equal(predicted, plain.translate(batch.images, batch.measured, [0]).mean)


def test_pixels_are_drawn_from_the_global_generator() -> None:
    batch, fits = cells(), []
    for seed in (1, 1, 2):
        method = make(pixels=5)
        torch.manual_seed(seed)
        fit(method, batch)
        fits.append(method.ridge.xx.clone())
    assert torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[0], fits[2])
    assert fits[0][:, -1, -1].tolist() == [5 * int(batch.measured[:, [1, t]].all(1).sum()) for t in (0, 2, 3)]


def test_a_prediction_knows_its_sources_alone() -> None:
    method, batch = make(), cells()
    fit(method, batch)
    before = method.translate(batch.images, batch.measured, [2, 0]).mean
    other = batch.images.clone()
    other[:, [0, 2, 3]] = torch.rand(12, 3, 16, 16)
    other[~batch.measured[:, 1], 1] = 1  # chromatin that `measured` does not mark
    assert torch.equal(before, method.translate(other, batch.measured, [2, 0]).mean)


def test_a_source_is_returned_as_it_is() -> None:
    method, batch = make(), cells()
    fit(method, batch)
    predicted = method.translate(batch.images, batch.measured, [1, 3])
    assert torch.equal(predicted.mean[:, 0], batch.images[:, 1])
    assert predicted.scale is None


def test_the_same_weights_serve_images_of_any_size() -> None:
    method, batch = make(), cells()
    fit(method, batch)
    field = torch.rand(1, 4, 65, 71)
    measured = torch.ones(1, 4, dtype=torch.bool)
    whole = method.translate(field, measured, [0]).mean
    assert whole.shape == (1, 1, 65, 71)
    crop = method.translate(field[..., 10:61, 12:65], measured, [0]).mean  # 4 sigma is 12 px
    torch.testing.assert_close(crop[..., 12:-12, 12:-12], whole[..., 22:49, 24:53])


def test_a_wide_blur_is_left_out_by_the_crops_it_learns_from() -> None:
    assert build_method(LinearConfig(), PANEL, 64).ridge.sigmas == (0, 1, 2, 4, 8, 16, 32)
    assert build_method(LinearConfig(), PANEL, 16).ridge.sigmas == (0, 1, 2, 4, 8)
    with pytest.raises(InputError, match=r"method.sigmas: every blur is wider than half a crop of 16 px"):
        make(sigmas=(9, 10))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (("DAN",), "no marker 'DAN' in the panel P0, DNA, P2, P3. Did you mean 'DNA'"),
        (("P0", "P2", "DNA", "P3"), "method.sources: P0, DNA, P2, P3 are all markers of the panel"),
    ],
)
def test_sources_that_cannot_be_used_are_refused(sources: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(sources=sources)


def test_cells_without_pairs_are_refused() -> None:
    measured = cells().measured
    measured[:, 2] = ~measured[:, 1]
    with pytest.raises(InputError, match="linear learns from cells that show DNA and P2 together"):
        make().prepare(measured, seed=0)


def test_ranks_share_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with the same batch: everything counts twice."""
    alone, shared, batch = make(), make(), cells()
    fit(alone, batch)
    shared.world = 2
    monkeypatch.setattr(dist, "all_reduce", lambda part: part.mul_(2))
    fit(shared, batch)
    torch.testing.assert_close(shared.ridge.xx, 2 * alone.ridge.xx)
    torch.testing.assert_close(shared.ridge.weights(), alone.ridge.weights())
