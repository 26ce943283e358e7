"""What a method fits on held-out cells when its weights stand."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from imgshared.data.feed import Feed
from imgshared.methods.base import Method
from imgshared.training.checkpoint import load, save
from imgshared.training.devices import add_ranks
from imgshared.training.ema import Ema

CELLS = 1000  # held-out ones, at most


@torch.no_grad()
def settle(method: Method, feed: Feed, batch_size: int, best: Path, ema: Ema | None, fabric: Fabric) -> str:
    """Let a method fit what it fits (`Method.settle`) to the weights of the checkpoint `best`, and to the last ones.

    Parameters
    ----------
    method
        With its last weights, which it keeps.
    feed
        Of the held-out cells; without any nothing is fitted.
    best
        Is written again; is not there where the weights are no numbers.
    ema
        The average of the last weights, which would predict.

    Returns
    -------
    What the method says of `best`.
    """
    if not method.settles or not len(feed) or not best.exists():
        return ""
    method.eval()

    def fit() -> str:
        with fabric.autocast():
            return method.settle(feed.once(batch_size, CELLS), lambda sums: add_ranks(sums, fabric.world_size))

    last = _weights(method)
    tree, contract = load(best)
    method.load_state_dict(tree["model"])
    said = fit()
    fabric.barrier()  # no rank reads `best` while it is written
    if fabric.is_global_zero:
        save(best, tree | {"model": _weights(method)}, contract)
    method.load_state_dict(last)
    with ema.in_place() if ema else nullcontext():
        fit()
    return said


def _weights(method: Method) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items()}
