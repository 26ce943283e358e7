"""Whole slides: read, predict and write tile by tile, in memory that does not grow with the slide."""

from __future__ import annotations

import contextlib
import errno
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgshared.config import SlideConfig
from imgshared.data.place import put_in_place
from imgshared.data.windows import Read, Span, plan_tiles
from imgshared.prediction.run import Run
from imgshared.slides.cells import measure_cells, open_labels
from imgshared.slides.damage import Damage, around, collect, covered, record_of
from imgshared.slides.job import Job, dtype_of, settle
from imgshared.slides.place import cells_path, is_ome_tiff, make_way, partial_of, refuse_place
from imgshared.slides.pyramid import PyramidWriter
from imgshared.slides.tiff import write_ome_tiff
from imgshared.types import InputError

Progress = Callable[[str, int, int], None]
Tile = tuple[int, Span]


def predict_slide(
    run: Run,
    path: Path,
    out: Path,
    config: SlideConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Path:
    """Predict the unmeasured stains of a slide.

    Written: a sharded OME-Zarr 0.5 with its pyramid, or where `out` ends in .ome.tif a pyramidal OME-TIFF; predicted
    channels are called ``<marker>_imputed`` and in raw intensities, their provenance is the attribute ``imgshared``.
    With `cells` also ``<out without its extension>.cells.zarr``, see `measure_cells`; `warn` is told where most of them
    are better not predicted. Where `tissue` shows glass, pixel by pixel, predicted channels are zero; measured ones are
    always what was measured. With `skip_damaged` predicted channels are zero wherever the model would have seen what
    cannot be read.

    An interrupted prediction is gone on with by the same call; finished tiles are not predicted again, and nothing has
    its name before it is whole. Under torchrun each process takes its share of the tiles.

    Raises
    ------
    InputError
        Where the slide does not fit the model, a wish has no effect, the dtype does not hold measured channels, `out`
        exists or is the slide, or its name is that of another kind of image; an interrupted prediction with other
        settings lies there; the mask of cells holds none; a window of the slide cannot be read, or holds floats that
        are no intensities; the disk is full.
    """
    config, fabric, out = config or SlideConfig(), run.fabric, out.resolve()  # of a link, what it leads to
    refuse_place(path, out, overwrite)
    job = settle(run, path, config)
    labels = open_labels(job.slide, Path(config.cells)) if config.cells else None
    unfinished = partial_of(out)
    try:
        _write_image(job, out, overwrite, progress)
        if fabric.global_rank == 0:
            if labels is not None:
                measure_cells(job, labels, unfinished, cells_path(out), progress, warn)
            if is_ome_tiff(out):
                if progress:
                    progress("write OME-TIFF", 0, 1)
                write_ome_tiff(unfinished, unfinished / out.name).replace(out)
                shutil.rmtree(unfinished)
            else:
                put_in_place(unfinished, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"the disk is full: what is done of {out} is kept. Free space and run the same command again"
            ) from error
        raise
    fabric.barrier()
    return out


def _write_image(job: Job, out: Path, overwrite: bool, progress: Progress | None) -> None:
    """Write what is not yet done of an image, in its unfinished place; each process its share of the tiles."""
    fabric, about, looks, folder = job.run.fabric, job.about, job.looks, partial_of(out)
    kind = dtype_of(job.run, job.config)
    begin = partial(PyramidWriter, folder, (len(looks), *job.slide.shape), kind, tile=job.config.tile, about=about)
    if fabric.global_rank == 0:
        make_way(folder, about, overwrite)
        begin()  # the arrays, before the others open them
    fabric.barrier()
    writer = begin(rank=fabric.global_rank)
    finished = writer.done()
    fabric.barrier()  # all know what was done before anyone does more
    if not writer.whole:
        _write_tiles(job, writer, finished, progress)
        fabric.barrier()
        if fabric.global_rank == 0:
            if progress:
                progress("write pyramid", 0, 1)
            left_out = collect(folder, job.painter.reached)
            writer.finish(out.name, looks, job.slide.pixel_size_um, left_out)
    if fabric.global_rank == 0:
        writer.forget()
    fabric.barrier()


def _write_tiles(job: Job, writer: PyramidWriter, finished: set[int], progress: Progress | None) -> None:
    rank, world = job.run.fabric.global_rank, job.run.fabric.world_size
    spans = plan_tiles(job.slide.shape, job.config.tile)
    todo = [(k, span) for k, span in enumerate(spans) if k not in finished][rank::world]
    with _opened(job, writer.folder) as read, ThreadPoolExecutor(1) as writing:
        last: Future[None] | None = None
        for done, (number, pixels) in enumerate(_predicted(job, todo, read), 1):
            if last is not None:
                last.result()  # one tile is written while the next is predicted
            last = writing.submit(_write, writer, number, spans[number], pixels)
            if progress:
                progress("predict", min(len(finished) + done * world, len(spans)), len(spans))
        if last is not None:
            last.result()


@dataclass(frozen=True)
class _Readers:
    """What reads windows of the sources, with their damage, and of the channels that are written as they are."""

    sources: Read
    damage: Damage
    measured: Read | None


@dataclass(frozen=True)
class _Given:
    """What a tile is made of: pixels of the sources around it, None for glass; measured channels; mask of tissue."""

    sources: NDArray[Any] | None
    measured: NDArray[Any] | None
    tissue: NDArray[np.bool_] | None


@contextlib.contextmanager
def _opened(job: Job, folder: Path) -> Iterator[_Readers]:
    slide, rank, allowed = job.slide, job.run.fabric.global_rank, job.config.skip_damaged
    names = {"sources": job.source_names, "measured": list(job.measured.values())}
    lost = {kind: Damage(slide.shape, allowed=allowed, record=record_of(folder, kind, rank)) for kind in names}
    with contextlib.ExitStack() as stack:
        reads = {
            kind: lost[kind].guard(stack.enter_context(slide.reader(channels)), len(channels), slide.image.dtype)
            for kind, channels in names.items()
            if channels
        }
        yield _Readers(reads["sources"], lost["sources"], reads.get("measured"))


def _predicted(job: Job, todo: Sequence[Tile], read: _Readers) -> Iterator[tuple[int, NDArray[Any] | None]]:
    """Yield tiles' numbers and channels, None where all is zero; the next one is read while one is predicted."""
    with ThreadPoolExecutor(1) as reading:
        ahead: deque[tuple[Tile, Future[_Given]]] = deque()
        for tile in todo:
            ahead.append((tile, reading.submit(_read, job, tile[1], read)))
            if len(ahead) > 1:
                yield _drawn(job, read.damage, *ahead.popleft())
        while ahead:
            yield _drawn(job, read.damage, *ahead.popleft())


def _read(job: Job, tile: Span, read: _Readers) -> _Given:
    mask = job.tissue.within(*tile) if job.tissue is not None else None
    glass = mask is not None and not mask.any()
    measured = read.measured(*tile) if read.measured is not None else None
    return _Given(None if glass else read.sources(*job.painter.outer(tile)), measured, mask)


def _drawn(job: Job, damage: Damage, tile: Tile, waiting: Future[_Given]) -> tuple[int, NDArray[Any] | None]:
    """Return a tile's number and channels, (C, y, x) float32."""
    number, span = tile
    given = waiting.result()
    if given.sources is None and given.measured is None:
        return number, None
    if given.sources is None:
        count = len(job.looks) - len(job.measured)
        predicted = np.zeros((count, *(s.stop - s.start for s in span)), np.float32)
    else:
        predicted = job.painter(given.sources, span)
        seen = covered((around(block, job.painter.reached) for block in damage.blocks), span)
        predicted = predicted * (~seen if given.tissue is None else given.tissue & ~seen)
    beside = [] if given.measured is None else [given.measured.astype(np.float32)]
    return number, np.concatenate([*beside, predicted])


def _write(writer: PyramidWriter, number: int, span: Span, pixels: NDArray[Any] | None) -> None:
    if pixels is None:
        writer.note(number)
        return
    if writer.dtype.kind in "ui":
        pixels = np.rint(pixels).clip(0, np.iinfo(writer.dtype).max)
    writer.write(number, *span, pixels.astype(writer.dtype))
