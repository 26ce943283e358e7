"""How much of what further stains add to a prediction from chromatin is heeded: fitted on held-out cells, then used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imgshared.methods.translator import Translator
from imgshared.types import Batch, Prediction

DNA = 1
Make = Callable[..., tuple[Translator, Batch]]
FUSIONS = [{}, {"fusion": "product", "head": "laplace"}]


def predicted(method: Translator, batch: Batch, given: Tensor, target: int) -> Prediction:
    with torch.no_grad():
        return method.translate(batch.images, given & batch.measured, [target])


def drawn(method: Translator, batch: Batch, given: Tensor, target: int) -> Tensor:
    return predicted(method, batch, given, target).mean


def only(*channels: int) -> Tensor:
    return torch.tensor([c in channels for c in range(3)])


def parts(batch: Batch, *sizes: int) -> list[Batch]:
    pieces = (part.split(sizes) for part in (batch.index, batch.images, batch.measured))
    return [Batch(*part) for part in zip(*pieces, strict=True)]


def settle(method: Translator, batches: list[Batch]) -> list[float]:
    with torch.no_grad():
        method.settle(batches, lambda sums: sums)
    found: list[float] = method.stacking.tolist()
    return found


@pytest.mark.parametrize("settings", FUSIONS)
def test_the_fit_is_a_least_squares_of_cells_with_further_stains(
    settings: dict[str, Any], make_translator: Make
) -> None:
    method, batch = make_translator(settings)
    true, whole = {0: 0.3, 2: 0.8}, batch.measured.all(1)
    assert 2 < whole.sum() < len(whole)
    for target, weight in true.items():  # a stain that is mostly a mixture of both predictions
        alone, further = (drawn(method, batch, only(*given), target)[:, 0] for given in ((DNA,), (DNA, 2 - target)))
        batch.images[whole, target] = (alone + weight * (further - alone) + 0.01 * torch.randn_like(alone))[whole]
    expected = [1.0] * 3
    for target in true:
        alone, further = (drawn(method, batch, only(*given), target)[whole] for given in ((DNA,), (DNA, 2 - target)))
        y = batch.images[whole, target, None] - alone
        expected[target] = np.linalg.lstsq((further - alone).reshape(-1, 1), y.reshape(-1), rcond=None)[0].item()
    assert settle(method, parts(batch, 6, 4)) == pytest.approx(expected, rel=1e-3)
    assert settle(method, parts(batch, 6, 4)) == pytest.approx(expected, rel=1e-3)  # whatever was fitted before


def test_it_lies_between_nothing_and_all(make_translator: Make) -> None:
    method, batch = make_translator(measured=torch.ones(6, 3, dtype=torch.bool))
    for target, weight in ((0, -1.0), (2, 2.0)):
        alone, further = (drawn(method, batch, only(*given), target)[:, 0] for given in ((DNA,), (DNA, 2 - target)))
        batch.images[:, target] = alone + weight * (further - alone)
    assert settle(method, [batch]) == [0, 1, 1]
    said = "of what further stains add to predictions from DNA, as much is heeded: P0 0%, P2 100%"
    with torch.no_grad():
        assert said in method.settle([batch], lambda sums: sums)


def test_without_cells_that_could_tell_all_is_heeded(make_translator: Make) -> None:
    pairs = torch.tensor([[True, True, False], [False, True, True], [True, False, True]])
    method, batch = make_translator(measured=pairs)
    for batches in ([], [batch]):
        assert settle(method, batches) == [1, 1, 1]
        assert not method.settle(batches, lambda sums: sums)


@pytest.mark.parametrize("settings", FUSIONS)
def test_a_prediction_is_the_mixture_where_further_stains_stand_beside_chromatin(
    settings: dict[str, Any], make_translator: Make
) -> None:
    measured = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    method, batch = make_translator(settings, measured=measured)
    alone, further = (drawn(method, batch, only(*given), 2) for given in ((DNA,), (0, DNA)))
    method.stacking[:] = torch.tensor([0.6, 0.1, 0.25])
    mixed = drawn(method, batch, only(0, DNA), 2)
    torch.testing.assert_close(mixed[[0, 3]], (0.75 * alone + 0.25 * further)[[0, 3]], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(mixed[0], further[0], atol=1e-3)
    assert torch.equal(mixed[1:3], further[1:3])  # chromatin alone; another stain alone
    own = drawn(method, batch, measured, 0)
    method.stacking.fill_(1)
    assert torch.equal(own[[0, 3]], drawn(method, batch, measured, 0)[[0, 3]])  # what is given, it knows best itself
    assert not torch.equal(drawn(method, batch, only(0, DNA), 2)[0], mixed[0])


def test_the_spread_is_that_of_the_mixture(make_translator: Make) -> None:
    method, batch = make_translator({"head": "laplace"}, measured=torch.ones(4, 3, dtype=torch.bool))
    alone, further = (predicted(method, batch, only(*given), 2).scale for given in ((DNA,), (0, DNA)))
    assert alone is not None
    assert further is not None
    assert not torch.allclose(alone, further, rtol=1e-2)
    for weight, expected in ((0.0, alone), (0.25, 0.75 * alone + 0.25 * further)):
        method.stacking.fill_(weight)
        torch.testing.assert_close(predicted(method, batch, only(0, DNA), 2).scale, expected)
