"""The picture by which a user judges the segmentation: outlines on the chromatin channel."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from imgshared.data.scale import FONT, scale_bar

KEPT, DROPPED = (86, 180, 233), (230, 159, 0)  # sky blue and orange of Okabe & Ito: told apart by colour-blind eyes too
SIDE_PX = (900, 2400)  # the picture's longer side lies between these where whole zooms allow


def stride_of(shape: tuple[int, int]) -> int:
    """Return which every n-th pixel of a (Y, X) image a picture of it shows."""
    return -(-max(shape) // SIDE_PX[1])


def draw_outlines(
    path: Path,
    grey: NDArray[Any],
    labels: NDArray[np.integer[Any]],
    kept: NDArray[np.integer[Any]],
    *,
    title: str,
    pixel_size_um: float | None,
) -> None:
    """Write a PNG of the contrast-stretched chromatin with the outlines of kept and dropped cells.

    Parameters
    ----------
    grey, labels
        (y, x), every `stride_of`-th pixel of the image: intensities and labels.
    kept
        The labels that became crops; the others count as dropped.
    pixel_size_um
        Of this picture.
    """
    zoom = -(-SIDE_PX[0] // max(labels.shape))
    low, high = np.percentile(grey, (1, 99.7))
    grey = np.clip((grey.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1) ** 0.7 * 255
    grey, labels = (a.repeat(zoom, 0).repeat(zoom, 1) for a in (grey.astype(np.uint8), labels))
    edge = np.zeros(labels.shape, bool)  # a cell's pixels that border on another label
    edge[:-1] |= labels[:-1] != labels[1:]
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge &= labels > 0
    picture = np.repeat(grey[..., None], 3, axis=2)
    picture[edge] = np.where(np.isin(labels[edge], kept)[:, None], KEPT, DROPPED)
    _annotate(picture, title, pixel_size_um, zoom).save(path, compress_level=1)


def picture_folder(out: Path) -> Path:
    """Make an empty folder for the pictures of a store that is being made."""
    return _without_pictures(out.with_name(f"{out.name.removesuffix('.zarr')}.qc.partial"))


def publish(pictures: Path) -> None:
    """Put the pictures in the place of earlier ones, which are of the earlier store."""
    folder = _without_pictures(pictures.with_suffix(""))
    for picture in pictures.glob("*.png"):
        picture.rename(folder / picture.name)
    with contextlib.suppress(OSError):  # holds what is not ours
        pictures.rmdir()


def _without_pictures(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    return folder


def _annotate(picture: NDArray[np.uint8], title: str, pixel_size_um: float | None, zoom: int) -> Image.Image:
    """Put the title above and a scale bar below."""
    height, width = picture.shape[:2]
    image = Image.new("RGB", (width, height + 72), "white")
    image.paste(Image.fromarray(picture), (0, 36))
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(FONT, 17)
    draw.text((8, 7), title, "black", font)
    length, says = scale_bar(width // zoom, pixel_size_um)
    y, end = height + 54, 8 + length * zoom
    draw.rectangle((8, y - 3, end, y + 3), "black")
    draw.text((end + 8, y - 11), says, "black", font)
    for x, colour, word in ((width - 200, KEPT, "kept"), (width - 110, DROPPED, "dropped")):
        draw.rectangle((x, y - 6, x + 12, y + 6), colour)
        draw.text((x + 18, y - 11), word, "black", font)
    return image
