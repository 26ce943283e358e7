"""A slide as the model sees it: its channels by marker, on a grid of the model's pixel size, read window by window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from imgshared.config import SlideConfig
from imgshared.data.panel import nearest
from imgshared.data.readers import ImageFile, open_image
from imgshared.data.windows import Read, Resampled, level_shapes, windows
from imgshared.prediction.run import Run
from imgshared.types import InputError

SAME_SIZE = 0.02  # relative difference of pixel sizes that are one


@dataclass(frozen=True)
class Slide:
    """An image that a model can predict.

    Parameters
    ----------
    image
        Its header.
    level
        Of its pyramid, that is read.
    shape
        (Y, X) of the grid that is predicted: that level's, or a resampled one.
    level_shape
        (Y, X) of the level.
    pixel_size_um
        Micrometres a pixel of the grid, None where unknown.
    channels
        The model's channels that it holds, by their names in the file.
    """

    image: ImageFile
    level: int
    shape: tuple[int, int]
    level_shape: tuple[int, int]
    pixel_size_um: float | None
    channels: Mapping[int, str]

    @property
    def path(self) -> Path:
        """Of the image."""
        return self.image.path

    @contextlib.contextmanager
    def reader(self, names: Sequence[str]) -> Iterator[Read]:
        """Open the file, and yield what reads windows of the grid, (n, Y, X), of channels by their names in it.

        Raises
        ------
        InputError
            Of what it yields, where a window cannot be read, or holds float pixels that are no intensities: the channel
            and the place in the file's level are named.
        """
        with contextlib.ExitStack() as stack:
            every, alone = stack.enter_context(windows(self.image, names, self.level)), list[Read]()

            def read(rows: slice, columns: slice) -> NDArray[Any]:
                try:
                    pixels = every(rows, columns)
                except InputError as error:
                    if not alone:
                        alone.extend([stack.enter_context(windows(self.image, [n], self.level)) for n in names])
                    raise _of_channel(names, alone, rows, columns) or error from error
                try:
                    return self.image.checked(names, pixels)
                except InputError as error:
                    raise InputError(f"{error}, at rows {rows.start} to {rows.stop}, columns {columns.start} to "
                                     f"{columns.stop}") from error  # fmt: skip

            yield read if self.shape == self.level_shape else Resampled(read, self.level_shape, self.shape)


def _of_channel(names: Sequence[str], alone: Sequence[Read], rows: slice, columns: slice) -> InputError | None:
    """Return the error of the first channel that cannot be read."""
    for name, read in zip(names, alone, strict=True):
        try:
            read(rows, columns)
        except InputError as error:
            return InputError(f"channel {name!r} of {error}")
    return None


def open_slide(run: Run, path: Path, config: SlideConfig) -> Slide:
    """Open an image by its header, and hold it against what the model takes for granted.

    The configuration's channel names and pixel size hold in place of those of the header.

    Raises
    ------
    InputError
        Where the image cannot be used: damaged, a source is missing (the names that are there are listed), another
        number of channels than the configuration names, another dtype, or pixels of another size that the configuration
        does not allow to be resampled.
    """
    image = open_image(path, names=config.channels or ())
    if config.channels is not None:
        image = replace(image, channels=_named(image, config.channels))
    if config.pixel_size_um is not None:
        image = replace(image, pixel_size_um=config.pixel_size_um)
    if image.dtype.name != run.contract.dtype:
        raise InputError(
            f"{path} has {image.dtype} pixels, the model was trained on {run.contract.dtype}: convert the image, or "
            "train on data of this kind"
        )
    channels = _channels(run, image, run.source_mask(config.sources).nonzero()[:, 0].tolist())
    levels = level_shapes(path) if not image.files else [image.shape[1:]]
    level, shape, size = _grid(image, levels, run.contract.pixel_size_um, config.resample)
    return Slide(image, level, shape, levels[level], size, channels)


def _named(image: ImageFile, names: Sequence[str]) -> tuple[str, ...]:
    """Return the wished names of an image's channels."""
    count, lower = image.shape[0], [name.lower() for name in names]
    if len(names) != count:
        raise InputError(
            f"{image.path} holds {count} channel(s), but channels=[...] names {len(names)}: {', '.join(names)}"
        )
    twice = sorted({name for name in names if lower.count(name.lower()) > 1})
    if twice:
        raise InputError(f"channels=[...] names {', '.join(twice)} twice: each channel needs its own name")
    return tuple(names)


def _channels(run: Run, image: ImageFile, needed: Sequence[int]) -> dict[int, str]:
    found: dict[int, str] = {}
    for name in image.channels:
        channel = run.panel.find(name)
        if channel is not None:
            found.setdefault(channel, name)
    missing = [run.panel.markers[c] for c in needed if c not in found]
    if missing:
        raise InputError(
            f"{image.path} has no {', '.join(missing)}, which the prediction starts from; it has "
            f"{', '.join(image.channels)}.{nearest(missing[0], image.channels)} If a channel goes by another name, "
            "channels=[...] names them in file order"
        )
    return found


def _grid(
    image: ImageFile, levels: Sequence[tuple[int, int]], wanted: float | None, resample: bool
) -> tuple[int, tuple[int, int], float | None]:
    """Return the level of the wanted pixel size, the grid's shape and its pixel size."""
    own = image.pixel_size_um
    if wanted is None:
        return 0, levels[0], own  # a model that knows pixels alone
    if own is None:
        raise InputError(
            f"{image.path} does not say its pixel size, and the model was trained at {wanted:g} µm: give pixel_size_um"
        )
    sizes = [own * levels[0][0] / shape[0] for shape in levels]
    for level, size in enumerate(sizes):
        if abs(size - wanted) <= SAME_SIZE * wanted:
            return level, levels[level], size
    if not resample:
        told = ", ".join(f"{size:.4g}" for size in sizes)
        raise InputError(
            f"{image.path} has pixels of {told} µm, the model was trained at {wanted:g} µm: resample=true resamples "
            "it, pixel_size_um=... corrects it"
        )
    level = max([k for k, size in enumerate(sizes) if size < wanted], default=0)
    shape = tuple(max(1, round(side * sizes[level] / wanted)) for side in levels[level])
    return level, (shape[0], shape[1]), wanted
