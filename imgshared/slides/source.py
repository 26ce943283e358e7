"""A slide as the model sees it: its channels by marker, on a grid of the model's pixel size, read window by window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
        """Open the file, and yield what reads windows of the grid, (n, Y, X), of channels by their names in it."""
        with windows(self.image, names, self.level) as read:
            yield read if self.shape == self.level_shape else Resampled(read, self.level_shape, self.shape)


def open_slide(run: Run, path: Path, config: SlideConfig) -> Slide:
    """Open an image by its header, and hold it against what the model takes for granted.

    Raises
    ------
    InputError
        Where the image cannot be used: damaged, a source is missing (the names that are there are listed), another
        dtype, or pixels of another size that the configuration does not allow to be resampled.
    """
    image = open_image(path, names=config.channels or ())
    if image.pixel_size_um is None and config.pixel_size_um is not None:
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
            f"{image.path} has pixels of {told} µm, the model was trained at {wanted:g} µm: resample=true resamples it"
        )
    level = max([k for k, size in enumerate(sizes) if size < wanted], default=0)
    shape = tuple(max(1, round(side * sizes[level] / wanted)) for side in levels[level])
    return level, (shape[0], shape[1]), wanted
