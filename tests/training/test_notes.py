"""What is said of the training cells, and each trouble once."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from imgshared.build import build_method
from imgshared.config import ApolloConfig, CutConfig, LinearConfig, MethodConfig, Pix2pixConfig, RegressionConfig
from imgshared.config.schema import TrainConfig
from imgshared.data.panel import Panel
from imgshared.methods.base import FEW_CELLS
from imgshared.training.notes import Notes, about_cells, refuse_ignored
from imgshared.types import InputError

PANEL = Panel(("DNA", "CD3", "CD8"), "DNA")


def said_of(config: MethodConfig, measured: torch.Tensor, left_out: int = 0) -> list[str]:
    method = build_method(config, PANEL, 64)
    return list(about_cells(method, PANEL, measured, left_out))


@pytest.mark.parametrize("config", [LinearConfig(), RegressionConfig(), Pix2pixConfig()], ids=lambda c: c.name)
def test_few_pairs_are_said_by_number_where_the_cells_are_many(config: MethodConfig) -> None:
    measured = torch.zeros(700, 3, dtype=torch.bool)
    measured[:201, 0] = True
    measured[200:, 1] = True  # one cell shows both
    measured[:150, 2] = True
    (said,) = said_of(config, measured)
    assert said.startswith("CD3: 1 of the 500 training cells that show it show DNA, too")
    assert config.name in said
    measured[:, 0] = True
    assert said_of(config, measured) == []


def test_few_cells_are_not_said_again_as_few_pairs() -> None:
    measured = torch.ones(500, 3, dtype=torch.bool)
    measured[FEW_CELLS - 1 :, 1] = False
    (said,) = said_of(RegressionConfig(), measured)
    assert said == "CD3 is measured in 99 training cells alone: expect little of it"


def test_a_method_that_needs_no_pairs_says_nothing_of_them() -> None:
    apart = torch.zeros(600, 3, dtype=torch.bool)
    apart[:200, 0], apart[200:400, 1], apart[400:, 2] = True, True, True
    assert said_of(CutConfig(), apart) == []
    assert said_of(CutConfig(), apart, 7) == ["7 training cells show no stain of the panel and are left out"]


def test_each_trouble_is_said_once_however_its_sentence_changes() -> None:
    lines: list[str] = []
    notes = Notes(lines.append)
    notes.of_run(["few cells", "few cells", "few pairs"])
    notes.of_epoch(3, {"CD3 (a)": "CD3 (a) is flat (3%)", "CD3 (b)": "CD3 (b) is flat (4%)"})
    notes.of_epoch(4, {"CD3 (a)": "CD3 (a) is flat (2%)", "CD3 (c)": "CD3 (c) is flat (1%)"})
    assert lines == [
        "[yellow]note:[/] few cells",
        "[yellow]note:[/] few pairs",
        "[yellow]note, epoch 3:[/] CD3 (a) is flat (3%)",
        "[yellow]note, epoch 3:[/] CD3 (b) is flat (4%)",
        "[yellow]note, epoch 4:[/] CD3 (c) is flat (1%)",
    ]


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (LinearConfig(), {"ema": 0.9}, "train.ema has no effect here, for nothing is learnt by steps: .* 0.0$"),
        (LinearConfig(), {"gradient_clip": 1.0}, "train.gradient_clip has no effect here"),
        (LinearConfig(), {"patience": 3}, "train.patience has no effect here"),
        (CutConfig(), {"patience": 3}, "train.patience has no effect here, for no held-out loss may end a stage"),
        (RegressionConfig(), {"ema": 0.9, "gradient_clip": 1.0, "patience": 3, "diverged": 2.0}, None),
        (ApolloConfig(), {"ema": 0.9, "patience": 3}, None),  # its encoders are judged, its latents are not
        (CutConfig(), {"ema": 0.9, "diverged": 2.0}, None),
        (LinearConfig(), {}, None),
    ],
)
def test_a_setting_that_a_training_would_not_use_is_refused(
    config: MethodConfig, settings: dict[str, float], said: str | None
) -> None:
    method = build_method(config, PANEL, 64)
    method.prepare(torch.ones(4, 3, dtype=torch.bool), seed=0)
    with pytest.raises(InputError, match=said) if said else nullcontext():
        refuse_ignored(TrainConfig(**settings), method.stages)
