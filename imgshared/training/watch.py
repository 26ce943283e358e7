"""What a user wants to see of a training without asking: fixed cells as pictures, and signs of collapse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from imgshared.data.panel import Panel
from imgshared.methods.base import Method
from imgshared.types import Batch

CELLS, SHOWN, STAINS = 64, 6, 6  # cells that are watched; rows and stains of the picture
COLLAPSED = 0.05  # of the real spread between cells
GAP, CAPTION = 2, 14  # px


class Watch:
    """The same held-out cells, translated at every validation.

    Parameters
    ----------
    batch
        Held-out cells; None: nothing is watched. Those that show the sources are translated; where a stain is only
        known of other cells (unpaired learning), its real spread is theirs.
    sources
        Channels to translate from.
    panel
        The model's.
    folder
        Where the pictures go; None: nowhere.
    """

    def __init__(self, batch: Batch | None, sources: Sequence[int], panel: Panel, folder: Path | None) -> None:
        self.sources, self.panel, self.folder, self.targets = list(sources), panel, folder, list[int]()
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

    @torch.no_grad()
    def look(self, method: Method, step: int) -> tuple[dict[str, float], NDArray[np.uint8] | None]:
        """Translate; write ``<step>.png`` and return the spread of each stain and the picture, (Y, X) uint8.

        ``diversity/<marker>``: standard deviation between cells, mean over pixels, predicted (sharp, where the method
        has such an output) over real; a method that
        predicts the mean of what is possible stays below 1, a collapsed one near 0.
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
        """Draw a row a cell: the sources, then real (black where not measured) and predictions at one contrast."""
        rows = _spaced(self._measured[:, self.targets], SHOWN)
        columns: list[tuple[str, Tensor]] = [(self.panel.markers[c], self._real[rows, c]) for c in self.sources]
        for t, target in list(enumerate(self.targets))[:STAINS]:
            name = self.panel.markers[target]
            columns += [(name, self._real[rows, target]), *((what, x[rows, t]) for what, x in predicted.items())]
        side = self._real.shape[2] + GAP
        picture = Image.new("L", (len(columns) * (self._real.shape[3] + GAP), CAPTION + len(rows) * side))
        draw = ImageDraw.Draw(picture)
        for x, (name, images) in enumerate(columns):
            left = x * (self._real.shape[3] + GAP)
            draw.text((left + 1, 1), name[: self._real.shape[3] // 6], fill=255)
            for y, image in enumerate((images.float().clamp(0, 1) * 255).byte().cpu().numpy()):
                picture.paste(Image.fromarray(image), (left, CAPTION + y * side))
        return np.asarray(picture)


def collapsed(spread: dict[str, float]) -> list[str]:
    """Return a sentence for every stain whose predictions hardly differ between cells."""
    return [
        f"predicted {name.partition('/')[2]} hardly differs between cells ({100 * value:.0f}% of the real spread): "
        "mode collapse, or chromatin tells nothing of it"
        for name, value in spread.items()
        if value < COLLAPSED
    ]


def _spaced(measured: Tensor, n: int) -> list[int]:
    """Choose the cells that show most of the stains, the first of them."""
    order: Any = measured.sum(1).argsort(descending=True, stable=True)
    return sorted(order[:n].tolist())
