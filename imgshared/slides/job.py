"""What is settled before a slide's first tile is predicted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from imgshared.config import SlideConfig
from imgshared.data.panel import IMPUTED as IMPUTED
from imgshared.data.panel import UNCERTAINTY
from imgshared.prediction.images import draw_image
from imgshared.prediction.run import Run
from imgshared.prediction.trust import Trust, load_trust
from imgshared.prediction.write import refuse_uncalibrated
from imgshared.slides.fit import fitted_on_slide
from imgshared.slides.pyramid import ChannelLook
from imgshared.slides.source import Slide, open_slide
from imgshared.slides.tiles import Blended, Exact, reach, step_of
from imgshared.slides.tissue import Tissue, find_tissue, read_tissue
from imgshared.types import InputError


@dataclass(frozen=True)
class Job:
    """All that is settled before the first tile.

    Parameters
    ----------
    run
        With the normaliser that is used.
    sources, targets
        Channels of the model.
    trust
        Where intervals are wanted.
    painter
        Predicts tiles.
    """

    run: Run
    slide: Slide
    config: SlideConfig
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    trust: Trust | None
    tissue: Tissue | None
    painter: Exact | Blended

    @property
    def looks(self) -> list[ChannelLook]:
        """The channels of the image that is written: measured, predicted, uncertainties."""
        markers = self.run.panel.markers
        measured = [(name, c) for c, name in self.measured.items()]
        predicted = [(markers[t] + IMPUTED, t) for t in self.targets]
        looks = [ChannelLook(name, *self.run.normaliser.ends(c)) for name, c in (*measured, *predicted)]
        if self.trust is not None:
            spans = {t: self.run.normaliser.ends(t) for t in self.targets}
            looks += [
                ChannelLook(markers[t] + IMPUTED + UNCERTAINTY, 0.0, spans[t][1] - spans[t][0]) for t in self.targets
            ]
        return looks

    @property
    def measured(self) -> dict[int, str]:
        """The slide's channels that are written beside, by the model's."""
        return dict(sorted(self.slide.channels.items())) if self.config.measured else {}

    @property
    def source_names(self) -> list[str]:
        """The sources' names in the file."""
        return [self.slide.channels[c] for c in self.sources]

    @property
    def about(self) -> dict[str, Any]:
        """Provenance: what must be the same for a prediction to be gone on with."""
        markers = self.run.panel.markers
        names = [markers[t] + IMPUTED for t in self.targets]
        return {
            **provenance(self.run, self.slide.path, self.config),
            "kind": "predicted slide",
            "level": self.slide.level,
            "shape": list(self.slide.shape),
            "sources": [markers[c] for c in self.sources],
            "imputed": names,
            "uncertainty": [name + UNCERTAINTY for name in names] if self.trust is not None else [],
            "margin_px": self.painter.margin if isinstance(self.painter, Exact) else "blended windows",
        }


def provenance(run: Run, path: Path, config: SlideConfig) -> dict[str, Any]:
    """Say what is predicted of which slide or plate, by which run, with which settings."""
    return {
        "version": version("imgshared"),
        "method": run.experiment.method.name,
        "seeds": run.seeds,
        "run": str(run.path.resolve()),
        "checkpoint": run.checkpoint.name,
        "checkpoint_sha256": hashlib.sha256(run.checkpoint.read_bytes()).hexdigest(),
        "slide": str(path.resolve()),
        "settings": json.loads(json.dumps(dataclasses.asdict(config))),
    }


def settle(run: Run, path: Path, config: SlideConfig) -> Job:
    """Open the slide, refuse what cannot be done, and settle how its tiles are predicted."""
    run.refuse_crops_alone()
    run.refuse_sharp(config.sharp)
    slide = open_slide(run, path, config)
    if config.measured and not np.can_cast(slide.image.dtype, dtype_of(run, config)):
        raise InputError(
            f"dtype={config.dtype} does not hold the {slide.image.dtype} pixels of {path} that measured=true writes as "
            "they are: leave dtype out, or measured=true"
        )
    chosen = run.source_mask(config.sources)
    sources = tuple(chosen.nonzero()[:, 0].tolist())
    first = slide.channels[sources[0]]
    tissue = None
    if config.tissue is not None:
        given = None if config.tissue == "otsu" else Path(config.tissue)
        tissue = read_tissue(slide, given) if given else find_tissue(slide, first, skip_damaged=config.skip_damaged)
    if config.normaliser == "slide":
        run = fitted_on_slide(run, slide, sources, tissue, skip_damaged=config.skip_damaged)
    targets = tuple(run.target_channels(config.markers, chosen))
    trust = usual_trust(run, config) if config.intervals else None
    if config.intervals and trust is None:
        raise InputError(
            f"intervals=true: {run.path} has no calibration for these sources and the mean output; leave it out"
        )
    if trust is not None:
        refuse_uncalibrated(run, trust, targets)
    draw = partial(draw_image, run, sources=sources, targets=targets, sharp=config.sharp, trust=trust)
    seen = reach(run.method, chosen.to(run.fabric.device), targets, sharp=config.sharp)
    painter = Blended(draw, slide.shape) if seen is None else Exact(draw, slide.shape, seen, step_of(run.method))
    return Job(run, slide, config, sources, targets, trust, tissue, painter)


def usual_trust(run: Run, config: SlideConfig) -> Trust | None:
    """Return the run's calibration where it holds: for its usual sources and normaliser, and the mean."""
    usual = run.source_mask(config.sources).equal(run.source_mask(None))
    return load_trust(run.path) if usual and not config.sharp and config.normaliser == "checkpoint" else None


def dtype_of(run: Run, config: SlideConfig) -> np.dtype[Any]:
    """Return the dtype of the pixels that are written; a slide's own is the model's."""
    return np.dtype(run.contract.dtype if config.dtype == "auto" else config.dtype)


def clipped(run: Run, config: SlideConfig) -> list[str]:
    """Say which predicted stains were brighter in the training than the wished dtype can be."""
    kind, markers = dtype_of(run, config), run.panel.markers
    if np.can_cast(run.contract.dtype, kind):
        return []
    targets, most = run.target_channels(config.markers, run.source_mask(config.sources)), np.iinfo(kind).max
    over = [f"{markers[t]} ({end:,.0f})" for t in targets if (end := run.normaliser.ends(t)[1]) > most]
    if not over:
        return []
    return [
        f"dtype={config.dtype} cuts predictions off at {most:,}, and in the training these stains were brighter: "
        f"{', '.join(over)}. dtype=auto or float32 keeps them"
    ]
