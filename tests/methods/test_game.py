"""The signs of a discriminator's trouble."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from imgshared.losses import adversarial_discriminator
from imgshared.methods.game import signs_of_defeat


@pytest.mark.parametrize(("kind", "middle"), [("lsgan", 0.5), ("hinge", 0.0), ("bce", 0.0)])
def test_a_discriminator_that_does_worse_than_not_to_look_is_told(
    kind: Literal["lsgan", "hinge", "bce"], middle: float
) -> None:
    undecided = adversarial_discriminator(*torch.full((2, 4), middle), kind).item()
    values = {"discriminator/adversarial": 2.99 * undecided, "adversarial": 99.0, "discriminator/r1": 99.0}
    assert signs_of_defeat(values, kind, "r1") == []
    (sentence,) = signs_of_defeat({"discriminator/source/adversarial": 3.01 * undecided}, kind, "method.r1_weight")
    assert sentence.startswith(f"the discriminator of the source runs away: its loss is {3.01 * undecided:.2f}, and of")
    assert f"cannot tell {undecided:.2f}; lower method.lr_discriminator or set method.r1_weight" in sentence
