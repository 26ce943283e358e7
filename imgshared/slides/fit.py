"""A normaliser fitted on a whole slide: for a batch whose brightness differs from that of the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from imgshared.data.crops import IntensityRange
from imgshared.data.windows import plan_tiles
from imgshared.prediction.run import Run
from imgshared.slides.damage import Damage, covered
from imgshared.slides.source import Slide
from imgshared.slides.tissue import Tissue
from imgshared.types import InputError

SIDE = 2048  # px that are read at a time


def fitted_on_slide(
    run: Run, slide: Slide, sources: Sequence[int], tissue: Tissue | None, *, skip_damaged: bool = False
) -> Run:
    """Return the run with the sources' percentiles taken from all of the slide, its tissue where that is known.

    The other stains keep the training's: predictions come in its raw units. The training's percentiles are of the
    crops of cells, so give a mask of tissue where much of the slide is glass. With `skip_damaged` blocks that cannot be
    read do not count.

    Raises
    ------
    InputError
        Where a source is the same everywhere, or cannot be read.
    """
    kind = slide.image.dtype
    ranges, names = IntensityRange(len(sources)), [slide.channels[c] for c in sources]
    damage = Damage(slide.shape, allowed=skip_damaged)
    with slide.reader(names) as reader:
        read = damage.guard(reader, len(names), kind)
        for tile in plan_tiles(slide.shape, SIDE):
            inside = tissue.within(*tile) if tissue is not None else np.ones([s.stop - s.start for s in tile], bool)
            if not inside.any():
                continue
            pixels = read(*tile)
            inside &= ~covered(damage.blocks, tile)
            for k, plane in enumerate(pixels if inside.any() else ()):
                ranges.add(k, plane[inside])
    wish, known = run.experiment.normalise, run.normaliser
    low, high = list(known.low), list(known.high)
    for k, (channel, name) in enumerate(zip(sources, names, strict=True)):
        ends = ranges.percentiles(k, kind, (wish.low, wish.high)) if ranges.of(k, kind) else []
        if not ends or not ends[1] > ends[0]:
            raise InputError(f"{slide.path}: {name!r} is the same everywhere, so normaliser=slide cannot be fitted")
        plain = replace(known.select([channel]), low=(0.0,), high=(1.0,))
        found = plain.forward(torch.tensor(np.array(ends, np.float32))[None, None]).flatten().tolist()
        low[channel], high[channel] = found
    return replace(run, contract=replace(run.contract, normaliser=replace(known, low=tuple(low), high=tuple(high))))
