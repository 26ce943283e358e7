"""Devices, precision and ranks: what Lightning Fabric is asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from imgshared.types import InputError

logging.getLogger("lightning_fabric").setLevel(
    logging.WARNING
)  # its import sets INFO; `train` says the precision itself


PATIENCE = timedelta(days=7)  # one rank may write, or train its last fold, while the others wait
_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within, each process of torchrun works by itself, on its own device."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def place_among_processes() -> tuple[int, int]:
    """Return this process's rank and the number of processes that torchrun started; 0 and 1 without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def make_fabric(
    accelerator: Literal["auto", "cpu", "cuda", "mps"], precision: Literal["auto", "float32", "bf16"]
) -> Fabric:
    """Return a launched Fabric: one device, or under torchrun one a process (gloo on CPUs, NCCL on GPUs).

    Raises
    ------
    InputError
        For an accelerator that is not there.
    """
    chosen = accelerator
    if chosen == "auto":
        chosen = "cuda" if is_there("cuda") else "mps" if is_there("mps") else "cpu"
    if not is_there(chosen):
        raise InputError(f"train.accelerator={chosen}: torch finds none here. Set it to auto or cpu")
    half = precision == "bf16" or (precision == "auto" and has_bf16(chosen))
    together = place_among_processes()[1] > 1 and not _alone.get()
    own = [int(os.environ.get("LOCAL_RANK", "0"))] if chosen == "cuda" else 1
    fabric = Fabric(
        accelerator=chosen,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if together else own,
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")) if together else 1,
        strategy=DDPStrategy(timeout=PATIENCE) if together else "auto",
        precision="bf16-mixed" if half else "32-true",
    )
    fabric.launch()
    return fabric


def is_there(accelerator: str) -> bool:
    """Say whether torch finds a device of this kind, which "auto" always does."""
    match accelerator:
        case "cuda":
            return torch.cuda.is_available()
        case "mps":
            return torch.backends.mps.is_available()
        case _:
            return True


def has_bf16(accelerator: str) -> bool:
    """Say whether the hardware multiplies bf16 natively."""
    if accelerator == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if accelerator != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def average_gradients(parameters: Iterable[nn.Parameter], world: int) -> None:
    """Average gradients over ranks in one message.

    A rank without a stain counts its gradient as zero; a parameter without a gradient on any rank stays without one,
    as in one process, where Adam then leaves it alone.
    """
    if world == 1:
        return
    parameters = list(parameters)
    has = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    grads = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters]
    flat = torch.cat([*grads, has.to(grads[0].dtype)])
    dist.all_reduce(flat)
    *means, count = (flat / world).split([*(p.numel() for p in parameters), len(parameters)])
    for p, mean, some in zip(parameters, means, (count > 0).tolist(), strict=True):
        p.grad = torch.empty_like(p).copy_(mean.view_as(p)) if some else None  # in memory as the weight is


def lay_out(optimizer: torch.optim.Adam) -> None:
    """Lay moments out in memory as their weights are, as before they were saved, so that Adam steps as before."""
    for weight, state in optimizer.state.items():
        state |= {k: torch.empty_like(weight).copy_(v) for k, v in state.items() if v.shape == weight.shape}


def add_ranks(values: Tensor, world: int) -> Tensor:
    """Sum a tensor over ranks, in place."""
    if world > 1:
        dist.all_reduce(values)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate a tensor's rows over ranks, whose counts may differ, in rank order."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(c.item() for c in counts))
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n.item())] for part, n in zip(parts, counts, strict=True)])


def gather_states(state: Mapping[str, Tensor], fabric: Fabric) -> list[dict[str, Tensor]]:
    """Return on rank 0 what each rank holds, in rank order, on the CPU; nothing on others, nor with one rank."""
    if fabric.world_size == 1 or not state:
        return []
    states: list[dict[str, Tensor]] | None = [{}] * fabric.world_size if fabric.is_global_zero else None
    dist.gather_object({name: value.cpu() for name, value in state.items()}, states)
    return states or []
