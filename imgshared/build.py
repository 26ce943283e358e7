"""The only place where a configuration becomes objects."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from imgshared.config import (
    ApolloConfig,
    AugmentConfig,
    CutConfig,
    CycleGanConfig,
    Experiment,
    LinearConfig,
    MethodConfig,
    MvaeConfig,
    Pix2pixConfig,
    RegressionConfig,
    TranslatorConfig,
)
from imgshared.data.augment import Augment, channel_intensity, paired_geometry
from imgshared.data.normalise import Normaliser, fit_normaliser
from imgshared.data.panel import Panel, nearest
from imgshared.data.split import Split, column, make_split
from imgshared.data.store import CellStore
from imgshared.methods.apollo import Apollo
from imgshared.methods.base import Method
from imgshared.methods.cut import Cut
from imgshared.methods.cyclegan import CycleGan
from imgshared.methods.ensemble import Ensemble
from imgshared.methods.linear import Linear
from imgshared.methods.mvae import Mvae
from imgshared.methods.pix2pix import Pix2pix
from imgshared.methods.regression import Regression
from imgshared.methods.translator import Translator
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
    return make_split(store.obs, by=c.by, val=c.val, test=c.test, stratify=c.stratify, seed=c.seed)


def build_measured(experiment: Experiment, store: CellStore, panel: Panel) -> NDArray[np.bool_]:
    """Return what the method may learn from, (cells of the store, markers of the panel) bool.

    Raises
    ------
    InputError
        Where `unstained` names an unknown marker or a group that the store has not.
    """
    measured = store.measured[:, store.panel.indices(panel.markers)]
    groups = column(store.obs, experiment.split.by).astype(str).to_numpy()
    for marker, hidden in experiment.unstained.items():
        unknown = sorted(set(hidden) - set(groups))
        if unknown:
            near = nearest(unknown[0], set(groups))
            raise InputError(f"unstained.{marker}: no cell has {experiment.split.by} {unknown[0]!r}.{near}")
        measured[np.isin(groups, hidden), panel.index(marker)] = False
    return measured


def build_normaliser(
    experiment: Experiment, store: CellStore, panel: Panel, split: Split, measured: NDArray[np.bool_]
) -> Normaliser:
    """Fit the normaliser on the training groups, where `measured`, as `build_measured` returns it, marks a stain."""
    c = experiment.normalise
    cells = (split.assign(store.obs) == "train").nonzero()[0]
    return fit_normaliser(
        store,
        cells,
        store.panel.indices(panel.markers),
        measured[cells],
        transform=c.transform,
        cofactor=c.cofactor,
        low=c.low,
        high=c.high,
        seed=experiment.split.seed,
    )


def build_method(config: MethodConfig, panel: Panel, crop_px: int) -> Method:
    """Return the method with fresh networks.

    Raises
    ------
    InputError
        For settings that the chosen variant would not use, networks that do not fit the crops, unknown sources.
    """
    _refuse_ignored(config)
    match config:
        case ApolloConfig():
            return Apollo(config, markers=len(panel), chromatin=panel.chromatin_index, crop_px=crop_px)
        case CutConfig():
            return Cut(config, panel=panel, crop_px=crop_px)
        case CycleGanConfig():
            return CycleGan(config, panel=panel, crop_px=crop_px)
        case LinearConfig():
            return Linear(config, panel=panel, crop_px=crop_px)
        case MvaeConfig():
            return Mvae(config, panel=panel, crop_px=crop_px)
        case Pix2pixConfig():
            return Pix2pix(config, panel=panel, crop_px=crop_px)
        case RegressionConfig():
            return Regression(config, panel=panel, crop_px=crop_px)
        case TranslatorConfig():
            return Translator(config, panel=panel, crop_px=crop_px)


def build_trained(experiment: Experiment, panel: Panel, crop_px: int) -> Method:
    """Return what a run's weights are loaded into: the method, or an ensemble of such."""
    if not experiment.ensemble:
        return build_method(experiment.method, panel, crop_px)
    return Ensemble([build_method(experiment.method, panel, crop_px) for _ in experiment.ensemble])


def _refuse_ignored(config: MethodConfig) -> None:
    """Refuse settings that the chosen variant of a method would not use."""
    match config:
        case ApolloConfig():
            two_step = ("latent_noise", "draws", "latent_init_std", "norm_weight", "lr_decoder", "lr_latent",
                        "encoder_epochs")  # fmt: skip
            ignored = {name: f"method.one_step={str(config.one_step).lower()}" for name in
                       (two_step if config.one_step else ("kl_weight", "match_weight"))}  # fmt: skip
        case TranslatorConfig():
            _refuse_vain(config)
            ignored = _ignored_by_translator(config)
        case CutConfig(nce_weight=0):
            contrastive = ("identity_weight", "temperature", "patches", "nce_layers", "negatives")
            ignored = dict.fromkeys(contrastive, "method.nce_weight=0")
        case CycleGanConfig(cycle_weight=0) if config.identity_weight:
            raise InputError(
                "method.identity_weight is relative to method.cycle_weight and has no effect where that is 0: set both "
                "to 0"
            )
        case MvaeConfig():
            ignored = {"anneal": "method.beta=0"} if not config.beta else {}
            if config.proteins_per_step == 1:  # with chromatin two stains: no subset between one and all
                ignored["subsets"] = "method.proteins_per_step=1"
        case Pix2pixConfig(channels=(_,)):  # the last level is the output, which is never dropped
            ignored = {"dropout": "one level of method.channels"}
        case _:
            return
    for name, reason in ignored.items():
        section, _, key = name.rpartition(".")
        here = getattr(config, section) if section else config
        default = next(f.default for f in dataclasses.fields(here) if f.name == key)
        if getattr(here, key) != default:
            shown = str(default).lower() if isinstance(default, bool) else default
            raise InputError(f"method.{name} has no effect with {reason}: leave it out, or set it to {shown}")


def _refuse_vain(config: TranslatorConfig) -> None:
    """Refuse weights of which no training comes: of terms that never find anything, or none that teaches to draw."""
    w = config.weights
    hides = config.chromatin_only or config.hide or config.visible_proteins is not None
    if w.cross and not hides:
        raise InputError(
            "method.weights.cross is the error of hidden stains, and method.chromatin_only=0, hide=0 and "
            "visible_proteins=null hide none: set one of them, or cross to 0"
        )
    if not (w.full or w.shared or w.cross or w.identity or w.adversarial or w.cycle):
        raise InputError("method.weights: no term teaches to draw a stain: set full, shared or cross")


def _ignored_by_translator(config: TranslatorConfig) -> dict[str, str]:
    w = config.weights
    groups = (
        (not w.adversarial, "method.weights.adversarial=0",
         ("adversarial", "discriminator_channels", "discriminator_sees_source", "lr_discriminator", "weights.r1",
          "weights.sharp")),
        (not w.cross, "method.weights.cross=0", ("weights.sharp",)),
        (not (w.full or w.shared), "method.weights.full=0 and shared=0", ("rebuilt",)),
        (not (w.cross or w.agreement or w.independence), "no term of hidden stains", ("hidden_proteins",)),
        (not (w.patch_nce or w.patch_nce_identity), "method.weights.patch_nce=0",
         ("temperature", "patches", "negatives")),
        (not w.agreement, "method.weights.agreement=0", ("agreement",)),
        (not w.independence, "method.weights.independence=0", ("independence",)),
        (not (w.adversarial or w.patch_nce or w.cycle), "no translation term", ("translation_from",)),
        (config.fusion == "mean", "method.fusion=mean", ("weights.kl",)),
        (config.fusion == "product" and not w.full, "method.fusion=product and method.weights.full=0",
         ("latent_noise",)),
        (config.head != "mean" and not w.sharp, f"method.head={config.head}", ("error",)),
    )  # fmt: skip
    return {name: reason for ignored, reason, names in groups if ignored for name in names}


def build_augment(config: AugmentConfig, method: MethodConfig) -> Augment:
    """Return the augmentation, refusing geometry for a method whose latents belong to one picture of a cell."""
    geometry = paired_geometry(flips=config.flips, rotate_deg=config.rotate_deg, scale=config.scale, shift=config.shift)
    if geometry and isinstance(method, ApolloConfig) and not method.one_step:
        raise InputError(
            "augment: apollo's free latents belong to one picture of each cell, so flips, rotate_deg, scale and shift "
            "must stay off; gain and noise may be used"
        )
    return Augment(geometry, channel_intensity(gain=config.gain, noise=config.noise))
