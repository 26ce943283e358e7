"""Parts of a slide that cannot be read: refused, or on request left out and remembered."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgshared.data.windows import Read, Span, within
from imgshared.types import InputError

BLOCK = 256  # px, the least that is left out
RECORD = "damaged"  # files in the unfinished image: sources and measured channels, one a process, a line a block
Block = tuple[int, int, int, int]  # top, bottom, left, right


class Damage:
    """What could not be read of some channels of a slide.

    Parameters
    ----------
    shape
        (Y, X) of the grid that is read.
    allowed
        Whether to leave out what cannot be read; otherwise its error is raised.
    record
        A file to write it down in; None remembers it alone.
    """

    def __init__(self, shape: tuple[int, int], *, allowed: bool, record: Path | None = None) -> None:
        self.shape, self.allowed, self.record = shape, allowed, record
        self._blocks: set[Block] = set()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What was found so far: windows may be read by another thread."""
        return tuple(self._blocks)

    def guard(self, read: Read, channels: int, dtype: np.dtype[Any]) -> Read:
        """Read windows block by block where the whole cannot be read; pixels of a damaged block are zero.

        Where damage is allowed, blocks are looked at as a whole, so that what is left out does not depend on windows.
        """

        def guarded(rows: slice, columns: slice) -> NDArray[Any]:
            y, x = map(self._whole_blocks, (rows, columns), self.shape) if self.allowed else (rows, columns)
            try:
                pixels = read(y, x)
            except InputError:
                pixels = self._by_block(read, y, x, channels, dtype)
            return pixels[:, within(rows, y), within(columns, x)]

        return guarded

    def _by_block(self, read: Read, rows: slice, columns: slice, channels: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        out = np.zeros((channels, rows.stop - rows.start, columns.stop - columns.start), dtype)
        for y, x in itertools.product(_cuts(rows), _cuts(columns)):
            try:
                out[:, within(y, rows), within(x, columns)] = read(y, x)
            except InputError as error:
                if not self.allowed:
                    raise InputError(f"{error}, or leave out what cannot be read: skip_damaged=true") from error
                self._remember((y.start, y.stop, x.start, x.stop))
        return out

    def _remember(self, block: Block) -> None:
        if block not in self._blocks:
            self._blocks.add(block)
            if self.record is not None:
                with self.record.open("a") as file:
                    file.write(json.dumps(block) + "\n")

    @staticmethod
    def _whole_blocks(span: slice, side: int) -> slice:
        return slice(span.start // BLOCK * BLOCK, min(-(-span.stop // BLOCK) * BLOCK, side))


def covered(blocks: Iterable[Block], tile: Span) -> NDArray[np.bool_]:
    """Say which pixels of a tile, (y, x), lie in any of some blocks."""
    rows, columns = tile
    out = np.zeros((rows.stop - rows.start, columns.stop - columns.start), bool)
    for top, bottom, left, right in blocks:
        y, x = (slice(max(a - at.start, 0), max(b - at.start, 0)) for a, b, at in
                ((top, bottom, rows), (left, right, columns)))  # fmt: skip
        out[y, x] = True
    return out


def around(block: Block, reached: Callable[[Span], Span]) -> Block:
    """Return the block of all pixels whose prediction sees a block."""
    y, x = reached((slice(*block[:2]), slice(*block[2:])))
    return y.start, y.stop, x.start, x.stop


def record_of(folder: Path, kind: str, rank: int) -> Path:
    """Where a process writes down what it could not read: ``sources`` or ``measured`` channels."""
    return folder / f"{RECORD}.{kind}.{rank}"


def collect(folder: Path, reached: Callable[[Span], Span]) -> dict[str, Any]:
    """Return what all processes wrote down, as [top, bottom, left, right] in px; nothing where all could be read.

    ``damaged``: blocks that could not be read; ``unpredicted``: blocks where nothing is predicted, for the prediction
    would see a damaged block of a source.
    """
    found = {kind: _read(folder, kind) for kind in ("sources", "measured")}
    if not any(found.values()):
        return {}
    return {
        "damaged": [list(block) for block in sorted(found["sources"] | found["measured"])],
        "unpredicted": [list(around(block, reached)) for block in sorted(found["sources"])],
    }


def _read(folder: Path, kind: str) -> set[Block]:
    lines = [line for file in folder.glob(f"{RECORD}.{kind}.*") for line in file.read_text().splitlines()]
    return {tuple(json.loads(line)) for line in lines if line.endswith("]")}  # one without an end was cut off


def _cuts(span: slice) -> list[slice]:
    """Cut a slice at multiples of `BLOCK`."""
    edges = [span.start, *range(span.start - span.start % BLOCK + BLOCK, span.stop, BLOCK), span.stop]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
