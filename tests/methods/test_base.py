"""What several methods ask of the cells that they are to learn from."""

from __future__ import annotations

import pytest
import torch

from imgshared.build import build_method
from imgshared.config import ApolloConfig, MethodConfig, MvaeConfig
from imgshared.data.panel import Panel
from imgshared.methods.base import never_joined

MARKERS = ("P0", "P1", "DNA", "P3")


def cells(*stains: str) -> torch.Tensor:
    """Cells that show these stains, by their digits; D is chromatin."""
    return torch.tensor([["0" in s, "1" in s, "D" in s, "3" in s] for s in stains])


@pytest.mark.parametrize(
    ("shown", "apart"),
    [
        (("D0", "D1", "D3"), []),
        (("D0", "01", "13"), []),  # a chain
        (("D0", "13"), ["P1", "P3"]),  # two panels that share nothing
        (("D0", "3"), ["P3"]),  # nobody stained P1: another note says so
        (("D", "0"), ["P0"]),
        (("01",), ["P0", "P1"]),
    ],
)
def test_a_stain_that_no_chain_of_cells_joins_with_chromatin_is_named(shown: tuple[str, ...], apart: list[str]) -> None:
    said = never_joined(cells(*shown), 2, MARKERS)
    assert [sentence.partition(":")[0] for sentence in said] == apart
    assert all("beside DNA or a stain that others show beside DNA" in sentence for sentence in said)


@pytest.mark.parametrize("config", [ApolloConfig(), MvaeConfig()])
def test_methods_that_learn_from_stains_shown_together_name_it(config: MethodConfig) -> None:
    method = build_method(config, Panel(MARKERS, "DNA"), 64)
    (said,) = method.doubts(cells("D0", "01", "3"), MARKERS)
    assert said.startswith("P3: ")
