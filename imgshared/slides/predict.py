"""Whole slides: read, predict and write tile by tile, in memory that does not grow with the slide."""

from __future__ import annotations

import errno
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgshared.config import SlideConfig
from imgshared.data.windows import Read, Span, plan_tiles, within
from imgshared.prediction.run import Run
from imgshared.slides.cells import measure_cells, open_labels
from imgshared.slides.damage import Damage
from imgshared.slides.job import IMPUTED, Job, settle, usual_trust
from imgshared.slides.pyramid import PyramidWriter, begun, discard, partial_of
from imgshared.slides.tiff import write_ome_tiff
from imgshared.types import InputError

Progress = Callable[[str, int, int], None]
Tile = tuple[int, Span]
TIFF_ENDS = (".ome.tif", ".ome.tiff")


def predict_slide(
    run: Run,
    path: Path,
    out: Path,
    config: SlideConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Predict the unmeasured stains of a slide.

    Written: a sharded OME-Zarr 0.5 with its pyramid, or where `out` ends in .ome.tif a pyramidal OME-TIFF; predicted
    channels are called ``<marker>_imputed`` and in raw intensities, their provenance is the attribute ``imgshared``.
    With `cells` also ``<out without its extension>.cells.zarr``, see `measure_cells`.

    An interrupted prediction is gone on with by the same call; finished tiles are not predicted again. Under torchrun
    each process takes its share of the tiles.

    Raises
    ------
    InputError
        Where the slide does not fit the model, a wish has no effect, `out` exists or is the slide, a window of the
        slide cannot be read, or the disk is full.
    """
    config, fabric = config or SlideConfig(), run.fabric
    refuse_place(path, out, overwrite)
    job = settle(run, path, config)
    labels = open_labels(job.slide, Path(config.cells)) if config.cells else None
    image = Path(f"{out}.zarr") if str(out).endswith(TIFF_ENDS) else out
    try:
        if image == out or not image.exists():
            _write_tiles(job, image, overwrite, progress)
        if fabric.global_rank == 0:
            if labels is not None:
                names = {run.panel.markers[t] + IMPUTED: t for t in job.targets}
                measure_cells(
                    job.slide, labels, image, names, cells_path(out), usual_trust(run, config), job.about,
                    partial(progress, "measure cells") if progress else None,
                )  # fmt: skip
            if image != out:
                if progress:
                    progress("write OME-TIFF", 0, 1)
                write_ome_tiff(image, out)
                shutil.rmtree(image)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"the disk is full: what is done of {out} is kept. Free space and run the same command again"
            ) from error
        raise
    fabric.barrier()
    return out


def cells_path(out: Path) -> Path:
    """Where the table of cells of a predicted slide lies."""
    ends = (".ome.zarr", ".ome.tiff", ".ome.tif", ".zarr")
    name = next((out.name.removesuffix(end) for end in ends if out.name.endswith(end)), out.name)
    return out.with_name(f"{name}.cells.zarr")


def refuse_place(path: Path, out: Path, overwrite: bool) -> None:
    """Refuse to write where something is, or into the slide itself.

    Raises
    ------
    InputError
        Names the place.
    """
    here, source = out.resolve(), path.resolve()
    if here == source or here in source.parents or source in here.parents:
        raise InputError(
            f"{out} is, holds or lies in the slide that is predicted: measured images are never overwritten"
        )
    for place in (out, cells_path(out)):
        if place.exists() and not overwrite:
            raise InputError(f"{place} exists already: choose another name, or pass --overwrite to replace it")
    if out.is_dir() and not (out / "zarr.json").exists():
        raise InputError(f"{out} is no image, so it is not replaced: choose another name")


def _write_tiles(job: Job, out: Path, overwrite: bool, progress: Progress | None) -> None:
    """Write what is not yet done of an image; each process its share."""
    fabric, about, looks = job.run.fabric, job.about, job.looks
    kind = job.slide.image.dtype if job.config.dtype == "auto" else np.dtype(job.config.dtype)
    shape = (len(looks), *job.slide.shape)
    if fabric.global_rank == 0:
        _make_way(out, about, overwrite)
        PyramidWriter(out, shape, kind, tile=job.config.tile, about=about)  # the arrays, before the others open them
    fabric.barrier()
    writer = PyramidWriter(out, shape, kind, tile=job.config.tile, about=about, rank=fabric.global_rank)
    spans, finished = plan_tiles(job.slide.shape, job.config.tile), writer.done()
    fabric.barrier()  # all know what was done before anyone does more
    todo = [(k, span) for k, span in enumerate(spans) if k not in finished][fabric.global_rank :: fabric.world_size]
    damage = Damage(partial_of(out), fabric.global_rank, job.slide.shape, allowed=job.config.skip_damaged)
    with job.slide.reader(job.read_names) as read, ThreadPoolExecutor(1) as writing:
        guarded = damage.guard(read, len(job.read_names), job.slide.image.dtype)
        last: Future[None] | None = None
        for done, (number, pixels) in enumerate(_predicted(job, todo, damage, guarded), 1):
            if last is not None:
                last.result()  # one tile is written while the next is predicted
            last = writing.submit(_write, writer, number, spans[number], pixels)
            if progress:
                progress("predict", min(len(finished) + done * fabric.world_size, len(spans)), len(spans))
        if last is not None:
            last.result()
    fabric.barrier()
    if fabric.global_rank == 0:
        if progress:
            progress("write pyramid", 0, 1)
        writer.finish(looks, job.slide.pixel_size_um, damage.collect())
    fabric.barrier()


def _make_way(out: Path, about: Mapping[str, Any], overwrite: bool) -> None:
    """Keep what the same prediction has left, and refuse what another has."""
    left = begun(out)
    if left == about:
        return
    if left is not None and not overwrite:
        changed = ", ".join(k for k in about if left.get(k) != about[k])
        raise InputError(
            f"{partial_of(out)} holds an interrupted prediction with another {changed}: pass --overwrite to replace it"
        )
    discard(out)


def _predicted(job: Job, todo: Sequence[Tile], damage: Damage, read: Read) -> Iterator[tuple[int, NDArray[Any] | None]]:
    """Yield predicted tiles, None for glass; the next one is read while one is predicted."""
    with ThreadPoolExecutor(1) as reading:
        ahead: deque[tuple[Tile, Future[tuple[NDArray[Any], NDArray[np.bool_] | None] | None]]] = deque()
        for tile in todo:
            ahead.append((tile, reading.submit(_read, job, tile[1], read)))
            if len(ahead) > 1:
                yield _drawn(job, damage, *ahead.popleft())
        while ahead:
            yield _drawn(job, damage, *ahead.popleft())


def _read(job: Job, tile: Span, read: Read) -> tuple[NDArray[Any], NDArray[np.bool_] | None] | None:
    """Read what a tile is predicted from, and its mask of tissue; None for glass."""
    mask = job.tissue.within(*tile) if job.tissue is not None else None
    if mask is not None and not mask.any():
        return None
    return read(*job.painter.outer(tile)), mask


def _drawn(
    job: Job, damage: Damage, tile: Tile, waiting: Future[tuple[NDArray[Any], NDArray[np.bool_] | None] | None]
) -> tuple[int, NDArray[Any] | None]:
    """Return a tile's number and channels, (C, y, x) float32."""
    number, span = tile
    given = waiting.result()
    if given is None:
        return number, None
    pixels, mask = given
    sources, beside = pixels[: len(job.sources)], pixels[len(job.sources) :]
    outer = job.painter.outer(span)
    rows, columns = (within(t, o) for t, o in zip(span, outer, strict=True))
    predicted = job.painter(sources, span)
    if mask is not None:
        predicted = predicted * mask
    damage.blank(span, predicted)
    return number, np.concatenate([beside[:, rows, columns].astype(np.float32), predicted])


def _write(writer: PyramidWriter, number: int, span: Span, pixels: NDArray[Any] | None) -> None:
    if pixels is None:
        writer.note(number)
        return
    if writer.dtype.kind in "ui":
        pixels = np.rint(pixels).clip(0, np.iinfo(writer.dtype).max)
    writer.write(number, *span, pixels.astype(writer.dtype))
