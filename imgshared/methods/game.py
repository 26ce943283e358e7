"""What the adversarial methods have in common: Adam's betas, the discriminator's terms, the sign that it has won."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from imgshared.losses import adversarial_discriminator, r1_penalty
from imgshared.methods.base import sum_terms
from imgshared.types import LossTerms

BETAS = (0.5, 0.999)  # of Adam, as in pix2pix, CycleGAN and CUT
WON = 0.99  # share of the patches told right, beyond which the discriminator teaches nothing


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


def signs_of_defeat(values: Mapping[str, float], r1: str) -> list[str]:
    """Say of each discriminator that wins every time; `r1` is the setting that holds it back.

    Its share of patches told right is ``discriminator/accuracy``, of several ``discriminator/<of what>/accuracy``.
    """
    signs = []
    for name, share in values.items():
        judge, _, term = name.rpartition("/")
        if judge.startswith("discriminator") and term == "accuracy" and share > WON:
            of = judge.removeprefix("discriminator").replace("/", " of the ")
            signs.append(
                f"the discriminator{of} tells real from predicted every time ({100 * share:.1f}% of the patches), so "
                f"its gradient is spent: lower method.lr_discriminator or set {r1}"
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
