"""Running batch statistics that do not depend on how a batch is cut among processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

ENDS = ("running_mean", "running_var")


class BatchStatistics:
    """What the parts of a batch, on any rank, do to the running statistics of a module, averaged.

    Each part begins where the step began; a step of one part in one process is left as it is.

    Parameters
    ----------
    module
        Whose buffers are watched.
    parts, world
        Of a rank's share of a batch, and the number of ranks.
    """

    def __init__(self, module: nn.Module, parts: int, world: int) -> None:
        self._parts, self._world = parts * world, world
        named = module.named_buffers() if self._parts > 1 else ()
        self._live = [buffer for name, buffer in named if name.endswith(ENDS)]

    def begin(self) -> None:
        """Before the first part of a step."""
        self._before = [buffer.clone() for buffer in self._live]
        self._sums = [torch.zeros_like(buffer) for buffer in self._live]

    def take(self) -> None:
        """After each part."""
        for buffer, before, total in zip(self._live, self._before, self._sums, strict=True):
            total += buffer
            buffer.copy_(before)

    def end(self) -> None:
        """After the last part: the mean over all parts of all ranks."""
        if not self._live:
            return
        flat = torch.cat([total.flatten() for total in self._sums])
        if self._world > 1:
            dist.all_reduce(flat)
        means = (flat / self._parts).split([buffer.numel() for buffer in self._live])
        for buffer, mean in zip(self._live, means, strict=True):
            buffer.copy_(mean.view_as(buffer))
