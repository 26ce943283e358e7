"""Parts of a slide that cannot be read: refused, or on request left out and remembered."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgshared.data.windows import Read, Span, within
from imgshared.types import InputError

BLOCK = 256  # px, the least that is left out
RECORD = "damaged"  # files in the unfinished image, one a process; a line a block
Block = tuple[int, int, int, int]  # top, bottom, left, right


class Damage:
    """What could not be read of a slide.

    Parameters
    ----------
    folder
        The unfinished image.
    rank
        Of this process.
    shape
        (Y, X) of the slide's grid.
    allowed
        Whether to leave out what cannot be read; otherwise its error is raised.
    """

    def __init__(self, folder: Path, rank: int, shape: tuple[int, int], *, allowed: bool) -> None:
        self.folder, self.shape, self.allowed = folder, shape, allowed
        self._record = folder / f"{RECORD}.{rank}"
        self._blocks: set[Block] = set()

    def guard(self, read: Read, channels: int, dtype: np.dtype[Any]) -> Read:
        """Read windows block by block where the whole cannot be read; pixels of a damaged block are zero."""

        def guarded(rows: slice, columns: slice) -> NDArray[Any]:
            try:
                return read(rows, columns)
            except InputError as error:
                if not self.allowed:
                    raise InputError(f"{error}, or leave out what cannot be read: skip_damaged=true") from error
            out = np.zeros((channels, rows.stop - rows.start, columns.stop - columns.start), dtype)
            for y, x in itertools.product(_cuts(rows), _cuts(columns)):
                try:
                    out[:, within(y, rows), within(x, columns)] = read(y, x)
                except InputError:
                    self._remember(y.start // BLOCK * BLOCK, x.start // BLOCK * BLOCK)
            return out

        return guarded

    def blank(self, tile: Span, pixels: NDArray[Any]) -> None:
        """Set to zero what lies in damaged blocks of a tile, (C, y, x), in place."""
        rows, columns = tile
        for top, bottom, left, right in self._blocks:
            y, x = (slice(max(a - at.start, 0), max(b - at.start, 0)) for a, b, at in
                    ((top, bottom, rows), (left, right, columns)))  # fmt: skip
            pixels[:, y, x] = 0

    def collect(self) -> dict[str, Any]:
        """Return what all processes left out, ``{"damaged": [[top, bottom, left, right], ...]}``, and forget it."""
        files = list(self.folder.glob(f"{RECORD}.*"))
        lines = {line for file in files for line in file.read_text().splitlines() if line.endswith("]")}
        for file in files:
            file.unlink()
        return {"damaged": sorted(json.loads(line) for line in lines)} if lines else {}

    def _remember(self, y: int, x: int) -> None:
        block = (y, min(y + BLOCK, self.shape[0]), x, min(x + BLOCK, self.shape[1]))
        if block not in self._blocks:
            self._blocks.add(block)
            with self._record.open("a") as file:
                file.write(json.dumps(block) + "\n")


def _cuts(span: slice) -> list[slice]:
    """Cut a slice at multiples of `BLOCK`."""
    edges = [span.start, *range(span.start - span.start % BLOCK + BLOCK, span.stop, BLOCK), span.stop]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
