"""A small translator and a batch of cells for it, at which its terms can be calculated by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from imgshared.config import TranslatorConfig, TranslatorWeights
from imgshared.data.panel import Panel
from imgshared.methods.translator import Translator
from imgshared.types import Batch

DNA = 1
SMALL = TranslatorConfig(
    channels=(4, 6),
    shared_fraction=0.5,
    marker_dim=3,
    discriminator_channels=(4, 5),
    discriminator_sees_source=False,
)
OFF = TranslatorWeights(**{f.name: 0.0 for f in fields(TranslatorWeights)})


@pytest.fixture(scope="session")
def make_translator() -> Callable[..., tuple[Translator, Batch]]:
    """Make a translator and cells from settings of its config; of the weights, those that are not zero."""
    return translator_and_cells


def translator_and_cells(
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
    chosen = dict(settings or {})
    chosen["weights"] = replace(OFF, **chosen["weights"]) if "weights" in chosen else TranslatorWeights()
    method = Translator(replace(SMALL, **chosen), panel=Panel(markers, "DNA"), crop_px=size[0])
    with torch.no_grad():
        for parameter in method.parameters():  # those that start at zero too
            parameter.normal_(0, 0.8 / max(parameter[0].numel(), 4) ** 0.5)
    images = torch.rand(*measured.shape, *size)
    images[~measured] = torch.nan  # nothing may ever read them
    method.prepare(measured, seed=0)
    method.start(method.stages[0])
    method.turn("generator")
    method.eval()  # batch statistics would tie a cell's formula to the others
    return method, Batch(torch.arange(len(measured)), images, measured)


@pytest.fixture(scope="session")
def make() -> Callable[..., tuple[Translator, Batch]]:
    """The same from measured stains and weights: a cell shows chromatin alone, and a step draws all that is hidden."""

    def make(measured: Tensor, weights: dict[str, float], **settings: Any) -> tuple[Translator, Batch]:
        shown = {"visible_proteins": None, "hidden_proteins": None, "chromatin_only": 1.0, "hide": 0.0}
        return translator_and_cells({**shown, "weights": weights, **settings}, measured=measured)

    return make


@pytest.fixture
def three_stains() -> Tensor:
    """DNA in all of 20 cells, P0 in 12 of them, P2 in 5 of the others."""
    measured = torch.zeros(20, 3, dtype=torch.bool)
    measured[:, DNA] = measured[:12, 0] = measured[14:19, 2] = True
    return measured


@pytest.fixture
def two_stains() -> Tensor:
    """P0 and DNA in 4 cells, DNA alone in 3, P0 alone in 2: what a cell does not show is one stain."""
    measured = torch.ones(9, 2, dtype=torch.bool)
    measured[4:7, 0] = measured[7:, DNA] = False
    return measured


@pytest.fixture
def never_together() -> Tensor:
    """P0 in 8 cells, DNA in the 8 others."""
    measured = torch.zeros(16, 2, dtype=torch.bool)
    measured[:8, DNA] = measured[8:, 0] = True
    return measured
