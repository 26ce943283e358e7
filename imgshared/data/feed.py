"""Batches of normalised crops: a pure function of seed, epoch and step, wherever the crops live."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imgshared.data.augment import Augment, Geometry
from imgshared.data.normalise import Normaliser
from imgshared.data.store import CellStore
from imgshared.types import Batch

AHEAD = 4  # batches read ahead of need
BLOCK = 1024  # crops read at a time into memory
REPEATS = 10  # of a cell in an epoch, at most, by which panels of few cells are balanced
Residency = Literal["device", "memory", "stream"]


def mix(use: str, *numbers: int) -> int:
    """Hash what random numbers are for, and where in a training they are drawn, to a seed.

    Neighbouring (seed, epoch, step, part) give unrelated streams, and so do two uses at the same place.
    """
    # How many there are is one of them: SeedSequence takes keys that differ by zeros at their end alone for the same.
    key = [crc32(use.encode()), len(numbers), *(n & 0xFFFFFFFF for n in numbers)]
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


@dataclass
class Feed:
    """The cells of one part of a split, ready to be drawn.

    Parameters
    ----------
    store, cells, channels
        The crops: rows of the store, and the channel of each marker of the model's panel (None: not in the store).
    normaliser
        Of those channels.
    device
        Where batches go.
    residency
        "device": raw crops on the device; "memory": in host memory; "stream": read from Zarr ahead of need.
    batch_size
        Cells a step over all ranks together; a rank draws its share.
    balance
        "cells": every cell once an epoch; "panels": an epoch of as many cells, the same number of each combination of
        measured markers that occurs, so that the sides of unpaired data meet in every batch; fewer of one that would
        have to show a cell more than `REPEATS` times.
    stained
        (cells, channels) bool, what counts as measured; None: what the store says.
    parts
        Parts that a rank cuts its share of a batch into. What a part holds depends on the number of parts over all
        ranks, not on which rank draws it.
    most_steps
        After which an epoch ends, whatever cells are left; None: no limit.
    whole
        Whether an epoch ends with a smaller batch of the cells that are left, of which a part may be empty. Otherwise
        they wait for the next epoch's shuffle.
    """

    store: CellStore
    cells: NDArray[np.integer[Any]]
    channels: Sequence[int | None]
    normaliser: Normaliser
    device: torch.device
    residency: Residency
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    balance: Literal["cells", "panels"] = "cells"
    stained: NDArray[np.bool_] | None = None
    parts: int = 1
    most_steps: int | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        stained = self._pick(self.store.measured[self.cells]) if self.stained is None else self.stained
        self.measured = torch.from_numpy(stained)
        self._crops: Tensor | None = None
        if self.residency != "stream":
            self._crops = self._read_all()
            if self.residency == "device":
                self.measured = self.measured.to(self.device)

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def steps(self) -> int:
        """Steps an epoch, at least one."""
        full, left = divmod(len(self.cells), self.batch_size)
        every = max(1, full + (self.whole and left > 0))
        return min(every, self.most_steps or every)

    def epoch(self, epoch: int, start: int = 0, augment: Augment | None = None) -> Iterator[Batch]:
        """Yield this rank's parts of the batches of an epoch, one after the other, from step `start` on."""
        order = self._order(torch.Generator().manual_seed(mix("order", self.seed, epoch)))
        own = range(self.rank * self.parts, (self.rank + 1) * self.parts)
        places = [(step, part) for step in range(start, self.steps) for part in own]

        def rows(step: int, part: int) -> Tensor:
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            return batch.tensor_split(self.world * self.parts)[part]  # contiguous: each holds the panels in turn

        geometry = augment.geometry if augment else None
        work = ((rows(*place), geometry, mix("geometry", self.seed, epoch, *place)) for place in places)
        for place, batch in zip(places, self._batches(work), strict=True):
            if augment and len(batch.index):
                batch = augment.intensity(batch, mix("intensity", self.seed, epoch, *place))
            yield batch

    def _order(self, generator: torch.Generator) -> Tensor:
        """Shuffle; balanced panels are spread evenly over the epoch, and a panel of few cells begins anew."""
        n = len(self.cells)
        if self.balance == "cells":
            return torch.randperm(n, generator=generator)
        panel = torch.unique(self.measured.cpu(), dim=0, return_inverse=True)[1]
        rows = [(panel == p).nonzero()[:, 0] for p in range(int(panel.max()) + 1)]
        counts = _share_out(n, [len(r) for r in rows])
        turns = [
            torch.cat([r[torch.randperm(len(r), generator=generator)] for _ in range(-(-count // len(r)))])[:count]
            for r, count in zip(rows, counts, strict=True)
        ]
        places = torch.cat([(torch.arange(count) + 0.5) / count for count in counts])
        return torch.cat(turns)[places.argsort(stable=True)][:n]

    def once(self, batch_size: int, at_most: int | None = None) -> Iterator[Batch]:
        """Yield every cell once, in order, in this rank's share of the batches; or `at_most` so many, evenly spread."""
        step = max(1, -(-len(self.cells) // at_most)) if at_most else 1
        parts = torch.arange(0, len(self.cells), step).split(batch_size)[self.rank :: self.world]
        yield from self._batches((rows, None, 0) for rows in parts)

    def _batches(self, work: Iterator[tuple[Tensor, Geometry | None, int]]) -> Iterator[Batch]:
        if self.residency == "device":
            yield from (self._finish(*self._gather(*item)) for item in work)
        else:
            yield from (self._finish(*raw) for raw in read_ahead(work, lambda item: self._gather(*item)))

    def _gather(
        self, rows: Tensor, geometry: Geometry | None, seed: int
    ) -> tuple[Tensor, Tensor, Geometry | None, int]:
        """Read crops, and warp them where that is done in host memory; otherwise `_finish` warps them on the device."""
        raw = self._read(self.cells[rows.numpy()]) if self._crops is None else self._crops[rows.to(self._crops.device)]
        if raw.dtype == torch.int16:  # 16 bits without a sign, see `_read`
            raw = raw.view(torch.uint16) if self.device.type == "cpu" else raw.to(torch.int32) & 0xFFFF
        geometry = geometry if len(rows) else None
        if geometry is not None and self.device.type == "cpu":
            raw, geometry = geometry(raw, seed), None
        return rows, raw, geometry, seed

    def _finish(self, rows: Tensor, raw: Tensor, geometry: Geometry | None, seed: int) -> Batch:
        if raw.dtype == torch.uint16 and self.device.type != "cpu":
            raw = raw.to(torch.int32)  # few kernels off the CPU know uint16
        measured = self.measured[rows.to(self.measured.device)].to(self.device)
        raw = raw.to(self.device, non_blocking=True)
        raw = raw if geometry is None else geometry(raw, seed)
        images = self.normaliser.forward(raw) * measured[..., None, None]
        return Batch(rows.to(self.device), images.contiguous(memory_format=torch.channels_last), measured)

    def _read_all(self) -> Tensor:
        """Read block by block: memory, or the device, holds the crops once, not the copies that reading makes."""
        shape = (len(self.cells), len(self.channels), self.store.crop_px, self.store.crop_px)
        where = self.device if self.residency == "device" else None
        crops = torch.empty(shape, dtype=self._read(self.cells[:1]).dtype, device=where)
        for start in range(0, len(self.cells), BLOCK):
            crops[start : start + BLOCK] = self._read(self.cells[start : start + BLOCK])
        return crops

    def _read(self, cells: NDArray[np.integer[Any]]) -> Tensor:
        crops = self._pick(self.store.images(cells))
        if crops.dtype == np.uint16 and self.residency == "device":
            crops = crops.view(np.int16)  # the same bits, for torch indexes uint16 on the CPU alone
        return torch.from_numpy(np.ascontiguousarray(crops))

    def _pick(self, values: NDArray[Any]) -> NDArray[Any]:
        """Take the panel's channels of (n, C, ...) values; zero for a marker that the store does not hold."""
        picked = np.zeros((len(values), len(self.channels), *values.shape[2:]), values.dtype)
        for c, channel in enumerate(self.channels):
            if channel is not None:
                picked[:, c] = values[:, channel]
        return picked


def _share_out(n: int, sizes: Sequence[int]) -> list[int]:
    """Share n draws or a few more out to panels: evenly, but a panel takes `REPEATS` times its size at most."""
    left, each = n, 0
    for panels, size in zip(range(len(sizes), 0, -1), sorted(sizes), strict=True):
        each = -(-left // panels)
        if each <= REPEATS * size:
            break
        left -= REPEATS * size
    return [min(each, REPEATS * size) for size in sizes]


def choose_residency(
    wish: Literal["auto", "device", "memory", "stream"],
    store: CellStore,
    cells: int,
    channels: int,
    device: torch.device,
    processes: int = 1,
) -> Residency:
    """Return where the crops live: on the device or in memory where they take less than half of what is free there.

    Each of the host's `processes` holds them; a device is one process's own.
    """
    if wish != "auto":
        return wish
    bytes_ = cells * channels * store.crop_px**2 * max(store.dtype.itemsize, 1)
    if device.type == "cuda" and bytes_ < torch.cuda.mem_get_info(device)[0] // 2:
        return "device"
    return "memory" if bytes_ * processes < _free_memory() // 2 else "stream"


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 * 2**30  # no such file outside Linux


def read_ahead(work: Iterator[Any], read: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield ``read(item)`` for each item, computed in a thread a few items ahead; its errors are raised here."""
    queue: Queue[tuple[str, Any]] = Queue(maxsize=AHEAD)
    stop = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            try:
                return queue.put((kind, value), timeout=0.1)
            except Full:
                continue
        return None

    def run() -> None:
        try:
            for item in work:
                if stop.is_set():
                    return
                put("item", read(item))
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, value = queue.get(timeout=0.1)
            except Empty:
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
