"""How much of a Gaussian posterior is in use, dimension by dimension, and the sign of its collapse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from imgshared.losses import kl_per_dimension

ACTIVE = 0.01  # nats of KL from which a latent dimension counts as used
COLLAPSED = 0.05  # of the latent dimensions in use


@torch.no_grad()
def spread_of_kl(posteriors: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return how the mean KL of each dimension is spread over the dimensions.

    Parameters
    ----------
    posteriors
        Mean and log standard deviation, (R, D, ...) both: one pair, or one a level of a pyramid. A dimension is a
        column, or a channel of a map, whose KL is averaged over its rows and pixels.

    Returns
    -------
    `kl_low`, `kl_median` and `kl_high`, the 10%, 50% and 90% quantiles over the dimensions, in nats;
    `active_dimensions`, how many exceed `ACTIVE`.
    """
    rows = [[x.movedim(1, -1).flatten(0, -2) for x in both] for both in posteriors]
    kl = torch.cat([kl_per_dimension(mean, log_std) for mean, log_std in rows])
    low, median, high = kl.quantile(kl.new_tensor([0.1, 0.5, 0.9]))
    return {"kl_low": low, "kl_median": median, "kl_high": high, "active_dimensions": (kl > ACTIVE).sum().float()}


def signs_of_collapse(values: Mapping[str, float], dimensions: int, remedy: str, given: str = "") -> list[str]:
    """Say where hardly any of the latent dimensions carries information about a cell.

    `given` is what the watched values are named by before a slash, where they are not of all stains.
    """
    active = values.get(f"{given}/active_dimensions" if given else "active_dimensions", dimensions)
    if active >= COLLAPSED * dimensions:
        return []
    what = {"": "", "chromatin": " of chromatin alone", "protein": " of a protein alone"}[given]
    return [
        f"hardly any latent dimension carries information{what} ({active:.0f} of {dimensions}): posterior collapse; "
        f"{remedy}"
    ]
