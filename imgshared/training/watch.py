"""What a user wants to see of a training without asking: fixed cells as pictures, and signs of collapse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from imgshared.data.feed import Feed
from imgshared.data.panel import Panel
from imgshared.data.scale import FONT, scale_bar
from imgshared.methods.base import Method
from imgshared.types import Batch

CELLS, SHOWN, STAINS = 64, 6, 6  # cells that are translated, about; rows and stains of the picture
EACH = 4  # cells that show a stain, at least, where there are so many: panels of many stains take more than `CELLS`
COLLAPSED = 0.05  # of the real spread between cells
GAP, CAPTION = 2, 14  # px
LEAST = 64  # px that a crop is wide in the picture, magnified where it has less: names fit above it


class Watch:
    """The same cells, translated at every validation; see `find_cells`.

    Parameters
    ----------
    batch
        The cells; None: nothing is watched. Those that show the sources are translated; where a stain is only
        known of other cells (unpaired learning), its real spread is theirs.
    sources
        Channels to translate from.
    panel
        The model's.
    folder
        Where the pictures go; None: nowhere.
    pixel_size_um
        For their scale bar.
    """

    def __init__(
        self,
        batch: Batch | None,
        sources: Sequence[int],
        panel: Panel,
        folder: Path | None,
        pixel_size_um: float | None = None,
    ) -> None:
        self.sources, self.panel, self.folder, self.targets = list(sources), panel, folder, list[int]()
        self._pixel_size_um = pixel_size_um
        if batch is None:
            return
        whole = batch.measured[:, list(sources)].all(1).nonzero()[:, 0]
        self._real, self._measured = batch.images[whole], batch.measured[whole]
        self._given = torch.zeros_like(self._measured)
        self._given[:, list(sources)] = True
        self._spread: dict[int, float] = {}
        for c in (c for c in range(len(panel)) if c not in sources and len(whole) > 1):
            paired = self._measured[:, c]
            real = self._real[paired, c] if paired.sum() > 1 else batch.images[batch.measured[:, c], c]
            if len(real) > 1 and (spread := float(real.float().std(0).mean())) > 0:  # it needs two cells
                self._spread[c] = spread
        self.targets = list(self._spread)

    @property
    def told(self) -> str:
        """The names of the sources."""
        return ", ".join(self.panel.markers[c] for c in self.sources)

    @property
    def blind(self) -> str | None:
        """Say which stains cannot be watched, and why; None where all can."""
        others = [c for c in range(len(self.panel)) if c not in self.sources]
        names = ", ".join(self.panel.markers[c] for c in others if c not in self.targets)
        if not names:
            return None
        why = (
            "too few cells show it, or they are all alike" if self.targets else f"too few cells show it or {self.told}"
        )
        return f"{names} cannot be watched, neither in pictures nor for mode collapse: {why}"

    @torch.no_grad()
    def look(self, method: Method, step: int) -> tuple[dict[str, float], NDArray[np.uint8] | None]:
        """Translate; write ``<step>.png`` and return the spread of each stain and the picture, (Y, X) uint8.

        ``diversity/<marker>``: standard deviation between cells, mean over pixels, predicted (sharp, where the method
        has such an output) over real; a method that predicts the mean of what is possible stays below 1, a collapsed
        one near 0.
        """
        if not self.targets:
            return {}, None
        prediction = method.translate(self._real, self._given, self.targets)
        shown = {"predicted": prediction.mean, **({} if prediction.sharp is None else {"sharp": prediction.sharp()})}
        predicted = shown.get("sharp", prediction.mean).float()
        spread = {}
        for t, target in enumerate(self.targets):
            rows = self._measured[:, target]
            rows = rows if rows.sum() > 1 else torch.ones_like(rows)
            ours = float(predicted[rows, t].std(0).mean())
            spread[f"diversity/{self.panel.markers[target]}"] = ours / self._spread[target]
        picture = self._draw(shown)
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            Image.fromarray(picture).save(self.folder / f"{step:07d}.png")
        return spread, picture

    def _draw(self, predicted: dict[str, Tensor]) -> NDArray[np.uint8]:
        """Draw a row a cell: the sources, then real (black where not measured) and predictions at one contrast.

        Below is the scale bar.
        """
        rows = _showing(self._measured[:, self.targets], SHOWN)
        columns: list[tuple[str, Tensor]] = [(self.panel.markers[c], self._real[rows, c]) for c in self.sources]
        for t, target in list(enumerate(self.targets))[:STAINS]:
            name = self.panel.markers[target]
            columns += [(name, self._real[rows, target]), *((what, x[rows, t]) for what, x in predicted.items())]
        tall, wide = self._real.shape[2:]
        zoom = -(-LEAST // wide)
        high, across, font = tall * zoom + GAP, wide * zoom + GAP, ImageFont.truetype(FONT, 10)
        picture = Image.new("L", (len(columns) * across, 2 * CAPTION + len(rows) * high))
        draw = ImageDraw.Draw(picture)
        for x, (name, images) in enumerate(columns):
            fits = next(n for n in range(len(name), -1, -1) if font.getlength(name[:n]) < across)
            draw.text((x * across + 1, 1), name[:fits], 255, font)
            for y, image in enumerate((images.float().clamp(0, 1) * 255).byte().cpu().numpy()):
                crop = Image.fromarray(image.repeat(zoom, 0).repeat(zoom, 1))
                picture.paste(crop, (x * across, CAPTION + y * high))
        length, says = scale_bar(wide, self._pixel_size_um)
        middle = CAPTION + len(rows) * high + CAPTION // 2
        draw.rectangle((1, middle - 1, length * zoom, middle + 1), 255)
        draw.text((length * zoom + 5, middle), says, 255, font, anchor="lm")
        return np.asarray(picture)


def find_cells(held_out: Feed, training: Feed, sources: Sequence[int], panel: Panel) -> tuple[Batch | None, list[str]]:
    """Choose cells that show the sources, and for each other stain some that show it, beside the sources where any do.

    They are held out; where fewer than two of those show the sources, or a stain, training cells stand in.

    Returns
    -------
    The cells, None where nothing is shown twice, and the names of what training cells show in their place.
    """
    feeds = (held_out, training)
    measured: NDArray[np.bool_] = np.concatenate([feed.measured.cpu().numpy() for feed in feeds])
    held: NDArray[np.bool_] = np.repeat([True, False], [len(feed) for feed in feeds])
    whole: NDArray[np.bool_] = np.logical_and.reduce(measured[:, list(sources)], axis=1)
    targets = [c for c in range(len(panel)) if c not in sources]
    chosen, stand_in = np.zeros(len(measured), bool), list[str]()
    for c in targets:
        shows = measured[:, c]
        rows = _first_pair(held & whole & shows, held & shows, whole & shows, shows)
        chosen[_some(rows, max(EACH, CELLS // len(targets)))] = True
        stand_in += [] if held[rows].all() else [panel.markers[c]]
    rows = _first_pair(held & whole, whole)
    chosen[_some(rows[~chosen[rows]], CELLS - int((chosen & whole).sum()))] = True
    stand_in += [] if held[rows].all() else [", ".join(panel.markers[c] for c in sources)]
    parts = np.split(chosen, [len(held_out)])
    batches = [_read(feed, part) for feed, part in zip(feeds, parts, strict=True) if part.any()]
    if not batches:
        return None, stand_in
    index, images, shown = (torch.cat([getattr(b, n) for b in batches]) for n in ("index", "images", "measured"))
    return Batch(index, images, shown), stand_in


def _first_pair(*wishes: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the rows of the first mask that marks two; none where none does."""
    return next((wish.nonzero()[0] for wish in wishes if wish.sum() > 1), np.zeros(0, np.int64))


def _some(rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Choose at most so many of the rows, evenly spaced."""
    places = np.linspace(0, len(rows) - 1, max(0, min(n, len(rows)))).round().astype(int)
    some: NDArray[np.int64] = rows[places]
    return some


def _read(feed: Feed, chosen: NDArray[np.bool_]) -> Batch:
    """Read the chosen cells of a feed, all of them on every rank."""
    cells, stained = feed.cells[chosen], feed.measured.cpu().numpy()[chosen]
    few = replace(feed, cells=cells, stained=stained, residency="memory", rank=0, world=1)
    return next(few.once(len(cells)))


def collapsed(spread: dict[str, float], sources: str) -> dict[str, str]:
    """Return by its name a sentence for every stain whose predictions from the sources hardly differ between cells."""
    return {
        name: f"predicted {name.partition('/')[2]} hardly differs between cells ({100 * value:.0f}% of the real "
        f"spread): mode collapse, or nothing of it can be told from {sources}"
        for name, value in spread.items()
        if value < COLLAPSED
    }


def _showing(measured: Tensor, n: int) -> list[int]:
    """Choose n rows of (B, T), in order, that show every stain about as often as can be: panels differ between cells.

    One after the other the cell that shows most, where a stain counts the less the more rows show it already.
    """
    shown, chosen = torch.zeros(measured.shape[1], device=measured.device), list[int]()
    for _ in range(min(n, len(measured))):
        worth = (measured / (1 + shown)).sum(1)
        worth[chosen] = -1
        chosen.append(int(worth.argmax()))
        shown += measured[chosen[-1]]
    return sorted(chosen)
