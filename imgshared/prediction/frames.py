"""Cells of an image as the frames of one OME-TIFF, for a viewer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import tifffile
from numpy.typing import NDArray

from imgshared.data.panel import ABSTAIN, IMPUTED, UNCERTAINTY
from imgshared.data.place import partial_of, put_in_place
from imgshared.data.store import CellStore
from imgshared.prediction.run import Run
from imgshared.prediction.types import Floats
from imgshared.types import InputError

SUFFIX = ".ome.tif"
CLASSIC_BYTES = 2**31  # a classic TIFF ends at 4 GiB, and a page of a small crop is a good part directory


class OmeFrames:
    """One OME-TIFF an image: cells are frames (T), channels the measured stains and the predicted ones, float32.

    Predicted channels are called ``<marker>_imputed``. On request the half widths of their intervals come along as
    ``<marker>_imputed_uncertainty``, and, the same all over a cell's mask, ``<marker>_imputed_abstain`` (1: better
    not predicted) and ``ood_imputed`` (how odd the cell's source is, 0 to 1).

    Written beside, into ``<folder>.partial``, and renamed by `finish`; left without it, nothing remains.

    Raises
    ------
    InputError
        Where the folder exists (without `overwrite`) or holds anything else, or two images of the store would share a
        file.
    """

    def __init__(
        self, run: Run, store: CellStore, targets: Sequence[int], folder: Path, overwrite: bool, *, intervals: bool
    ) -> None:
        refuse_frames(store, folder, overwrite)
        self.store, self.channels = store, run.contract.check(store, ())
        self.folder, self.partial = folder, partial_of(folder)
        imputed = [run.panel.markers[t] + IMPUTED for t in targets]
        self.names = [*run.panel.markers, *imputed]
        if intervals:
            self.names += [name + end for end in (UNCERTAINTY, ABSTAIN) for name in imputed] + ["ood" + IMPUTED]
        self._images = store.obs["image"].astype(str).to_numpy()
        self._image: str | None = None
        self._spool: IO[bytes] | None = None  # on disk: all cells of a slide would fill the memory

    def __enter__(self) -> Self:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)  # gone already where finished

    def add(
        self,
        cells: NDArray[np.integer[Any]],
        predicted: Floats,
        intervals: Floats | None = None,
        told: NDArray[np.float64] | None = None,
    ) -> None:
        """Append cells, which come image by image in the order of the store; `told` (n, T + 1): abstain, oddness."""
        shown = [predicted]
        if intervals is not None and told is not None:
            shown += [intervals, (told[:, :, None, None] * self.store.masks(cells)[:, None]).astype(np.float32)]
        raw = self.store.images(cells)
        real = np.stack([raw[:, c] if c is not None else np.zeros_like(raw[:, 0]) for c in self.channels], 1)
        images = self._images[cells]
        for image in dict.fromkeys(images):
            if image != self._image:
                self.flush()
                self._image = image
                self._spool = tempfile.TemporaryFile(dir=self.partial)  # noqa: SIM115, `flush` closes it
            assert self._spool is not None
            rows = images == image
            frames = np.concatenate([x[rows] for x in (real, *shown)], 1).astype(np.float32)
            self._spool.write(frames.data)

    def finish(self) -> None:
        """Give the folder its name."""
        put_in_place(self.partial, self.folder)

    def flush(self) -> None:
        """Write the image whose cells have come so far."""
        if self._image is None or self._spool is None:
            return
        side, size = self.store.crop_px, self.store.pixel_size_um
        self._spool.flush()
        pixels = np.memmap(self._spool, np.float32, "r").reshape(-1, len(self.names), side, side)
        physical = {"PhysicalSizeX": size, "PhysicalSizeY": size, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
        tifffile.imwrite(
            self.partial / _file_name(self._image), pixels, photometric="minisblack", compression="zlib",
            bigtiff=pixels.nbytes > CLASSIC_BYTES,  # tifffile would ask only for what is not compressed
            metadata={"axes": "TCYX", "Channel": {"Name": self.names}, **(physical if size else {})},
        )  # fmt: skip
        self._spool.close()
        self._image = self._spool = None


def _file_name(image: str) -> str:
    return f"{image.replace('/', '_')}{SUFFIX}"


def refuse_frames(store: CellStore, folder: Path, overwrite: bool) -> None:
    """Refuse to write frames where something is, even to replace what is no folder of frames alone, or of images that
    would share a file.

    Raises
    ------
    InputError
        Names the folder or the file.
    """
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists already: choose another name, or pass --overwrite to replace it")
    for place in (folder, partial_of(folder)):  # the latter of an interrupted run
        others = [] if not place.exists() else [place] if place.is_file() else list(place.iterdir())
        if any(not file.name.endswith(SUFFIX) or file.is_dir() for file in others):
            raise InputError(f"{place} holds more than pictures (*{SUFFIX}), so it is not replaced: move it away")
    images = store.obs["image"].astype(str).to_numpy()
    blocks = images[np.append(True, images[1:] != images[:-1])]  # an image whose cells are apart would come twice
    files, counts = np.unique([_file_name(image) for image in blocks], return_counts=True)
    if (counts > 1).any():
        raise InputError(
            f"ome_tiff: the store would fill {files[counts > 1][0]} twice: its images share a name, or their cells "
            "are not in one block"
        )
