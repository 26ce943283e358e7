"""The only place where a configuration becomes objects."""

from __future__ import annotations

import dataclasses

from imgshared.config import ApolloConfig, AugmentConfig, Experiment, MethodConfig
from imgshared.data.augment import Augment, channel_intensity, paired_geometry
from imgshared.data.normalise import Normaliser, fit_normaliser
from imgshared.data.panel import Panel
from imgshared.data.split import Split, make_split
from imgshared.data.store import CellStore
from imgshared.methods.apollo import Apollo
from imgshared.methods.base import Method
from imgshared.types import InputError


def build_panel(experiment: Experiment, store: CellStore) -> Panel:
    """Return the model's panel: the store's, or the markers that the configuration keeps, in the store's order."""
    panel = store.panel
    if experiment.markers is None:
        return panel
    kept = {panel.markers[c] for c in panel.indices(experiment.markers)} | {panel.chromatin}
    return Panel(
        tuple(m for m in panel.markers if m in kept),
        panel.chromatin,
        {m: a for m, a in panel.aliases.items() if m in kept},
    )


def build_split(experiment: Experiment, store: CellStore) -> Split:
    """Return the grouped split."""
    c = experiment.split
    return make_split(store.obs, by=c.by, val=c.val, test=c.test, stratify=c.stratify, seed=experiment.seed)


def build_normaliser(experiment: Experiment, store: CellStore, panel: Panel, split: Split) -> Normaliser:
    """Fit the normaliser on the training groups."""
    c = experiment.normalise
    cells = (split.assign(store.obs) == "train").nonzero()[0]
    return fit_normaliser(
        store,
        cells,
        store.panel.indices(panel.markers),
        transform=c.transform,
        cofactor=c.cofactor,
        low=c.low,
        high=c.high,
        seed=experiment.seed,
    )


def build_method(config: MethodConfig, panel: Panel, crop_px: int) -> Method:
    """Return the method with fresh networks."""
    match config:
        case ApolloConfig():
            _refuse_ignored(config)
            return Apollo(config, markers=len(panel), chromatin=panel.chromatin_index, crop_px=crop_px)


def _refuse_ignored(config: ApolloConfig) -> None:
    """Refuse settings that the chosen variant of apollo would not use."""
    two_step = ("latent_noise", "latent_init_std", "norm_weight", "lr_decoder", "lr_latent", "encoder_epochs")
    unused = two_step if config.one_step else ("kl_weight", "match_weight")
    for field in dataclasses.fields(config):
        if field.name in unused and getattr(config, field.name) != field.default:
            raise InputError(
                f"method.{field.name} has no effect with method.one_step={str(config.one_step).lower()}: leave it out"
            )


def build_augment(config: AugmentConfig, method: MethodConfig) -> Augment:
    """Return the augmentation, refusing geometry for a method whose latents belong to one picture of a cell."""
    geometry = paired_geometry(flips=config.flips, rotate_deg=config.rotate_deg, scale=config.scale, shift=config.shift)
    if geometry and isinstance(method, ApolloConfig) and not method.one_step:
        raise InputError(
            "augment: apollo's free latents belong to one picture of each cell, so flips, rotate_deg, scale and shift "
            "must stay off; gain and noise may be used"
        )
    return Augment(geometry, channel_intensity(gain=config.gain, noise=config.noise))
