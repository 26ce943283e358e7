"""What the adversarial methods have in common: Adam's betas, the discriminator's terms, the signs of its trouble."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from imgshared.losses import adversarial_discriminator, r1_penalty
from imgshared.methods.base import sum_terms
from imgshared.types import LossTerms

BETAS = (0.5, 0.999)  # of Adam, as in pix2pix, CycleGAN and CUT
WON = 0.99  # share of the patches told right, beyond which the discriminator teaches nothing
UNDECIDED = {"lsgan": 0.25, "hinge": 2.0, "bce": math.log(2)}  # loss of a discriminator that cannot tell at all
ASTRAY = 3.0  # times that loss: worse than not to look


def discriminator_terms(
    real: Tensor, fake: Tensor, kind: Literal["lsgan", "hinge", "bce"], *, r1: float, images: Tensor
) -> LossTerms:
    """Adversarial and, where it has a weight, R1 term; `accuracy` is beside them in the parts, no term of the loss.

    Parameters
    ----------
    real, fake
        Logits, of any shapes.
    r1
        Weight of the penalty at the real `images`, which then require a gradient and gave `real`.
    """
    parts = {"adversarial": adversarial_discriminator(real, fake, kind)}
    if r1:
        parts["r1"] = r1 * r1_penalty(real, images)
    terms = sum_terms(parts)
    return LossTerms(terms.total, {**terms.parts, "accuracy": accuracy(real, fake, kind)})


def accuracy(real: Tensor, fake: Tensor, kind: Literal["lsgan", "hinge", "bce"]) -> Tensor:
    """Return the share of real and of predicted patches that the logits tell right, detached."""
    middle = 0.5 if kind == "lsgan" else 0.0  # between what real and predicted patches should reach
    return ((real > middle).float().mean() + (fake <= middle).float().mean()).detach() / 2


def signs_of_defeat(values: Mapping[str, float], kind: Literal["lsgan", "hinge", "bce"], r1: str) -> list[str]:
    """Say of each discriminator that it wins every time, or runs away; `r1` is the setting that holds it back.

    Its share of patches told right is ``discriminator/accuracy``, its loss without R1 ``discriminator/adversarial``; of
    several they are ``discriminator/<of what>/accuracy`` and so on.
    """
    signs = []
    for name, value in values.items():
        judge, _, term = name.rpartition("/")
        if not judge.startswith("discriminator"):
            continue
        who = "the discriminator" + judge.removeprefix("discriminator").replace("/", " of the ")
        if term == "accuracy" and value > WON:
            signs.append(
                f"{who} tells real from predicted every time ({100 * value:.1f}% of the patches), so its gradient is "
                f"spent: lower method.lr_discriminator or set {r1}"
            )
        if term == "adversarial" and value > ASTRAY * UNDECIDED[kind]:
            signs.append(
                f"{who} runs away: its loss is {value:.2f}, and of one that cannot tell {UNDECIDED[kind]:.2f}; lower "
                f"method.lr_discriminator or set {r1}"
            )
    return signs


def signs_of_rest(values: Mapping[str, float], held: str) -> list[str]:
    """Say where the discriminator had nothing to judge in a whole epoch; `held` is what no part of a batch did hold."""
    if any(name.startswith("discriminator/") for name in values):
        return []
    return [
        f"the discriminator had no step in the last epoch, for no part of a batch held {held}, and so the adversarial "
        "term means nothing: raise train.batch_size, set train.balance=panels, lower train.accumulate or the number of "
        "processes"
    ]
