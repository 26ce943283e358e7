"""The methods' settings, told apart by `name`; the defaults suit 64-pixel crops on two CPU cores or a small GPU."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from imgshared.config.terms import CLOSED, Channels, Count, Fraction, Positive, Probability, Weight

Adversarial = Literal["lsgan", "hinge", "bce"]


@dataclass(config=CLOSED, frozen=True)
class ApolloConfig:
    """apollo (Zhang, Shivashankar & Uhler, Nat Comput Sci 2026): latent optimisation, then encoders.

    The defaults suit 64-pixel crops; `configs/apollo_published.yaml` holds the published sizes.
    """

    name: Literal["apollo"] = "apollo"
    channels: Channels = (32, 64, 128, 96)  # one 4x4 stride-2 convolution each
    shared_channels: int = 80  # of the last ones; the rest feed the specific head
    shared_dim: Count = 128
    specific_dim: Annotated[int, Field(ge=0)] = 32  # 0: no specific latents (ablation)
    marker_dim: Count = 64
    likelihood: Literal["bce", "mse"] = "bce"
    shared_decoders: bool = True  # False: no D'_m (ablation)
    one_step: bool = False  # True: encoders and decoders at once, as a variational autoencoder (ablation)
    latent_noise: Weight = 1.0  # standard deviation of e
    # Decodings of noisy latents in prediction, whose spread is the predicted scale of a pixel; 0: no scale.
    draws: Annotated[int, Field(ge=0)] = 0
    latent_init_std: Weight = 0.1  # of the free latents at the start
    norm_weight: Weight = 1e-3  # lambda
    kl_weight: Weight = 1e-7  # one_step only
    match_weight: Weight = 1.0  # one_step only: shared latents of a cell's stains agree
    proteins_per_step: Count | None = None  # None: all of a cell's proteins in every step
    latent_epochs: Count = 40  # stage 1 (all epochs with one_step)
    encoder_epochs: Count = 30  # stage 2
    lr_decoder: Positive = 1e-3
    lr_latent: Positive = 1e-1
    lr_encoder: Positive = 1e-3


@dataclass(config=CLOSED, frozen=True)
class TranslatorWeights:
    """The weight of each term of the translator's loss; a term at zero is not computed."""

    full: Weight = 1.0  # each visible stain, from the fused shared maps and its own specific maps
    shared: Weight = 0.1  # each visible stain from the fused shared maps alone
    cross: Weight = 1.0  # each hidden stain from the shared maps of the visible ones
    agreement: Weight = 0.0  # shared latents of a cell's chromatin and of another of its stains find each other
    # shared and specific latents of a stain tell nothing of each other; of stains that 8 cells of a step show
    independence: Weight = 0.0
    patch_nce: Weight = 0.0  # patches of a translated image find their patches in the source (CUT)
    # the stain that a cell is translated to, where it is known, in a second output, the mean with texture; above 0
    # adversarial teaches that texture alone; patch_nce and cycle judge it, too, and teach the encoders beside it
    sharp: Weight = 0.0
    adversarial: Weight = 0.0  # a discriminator takes translated for real stains
    r1: Weight = 0.0  # gradient penalty of the discriminator on real stains
    cycle: Weight = 0.0  # a translated stain, translated back, is the source
    identity: Weight = 0.0  # L1 of a stain translated to itself (CycleGAN)
    patch_nce_identity: Weight = 0.0  # patch_nce of a stain translated to itself (CUT, with the weight of patch_nce)
    norm: Weight = 0.0  # size of the pooled latents (after apollo, whose noise is on the latents; here on the maps)
    # beta: KL of a cell's fused shared maps to a standard normal, in nats a pixel as the likelihood of a head with a
    # scale is; fusion = product only
    kl: Weight = 0.0


@dataclass(config=CLOSED, frozen=True)
class TranslatorConfig:
    """translator: shared and specific feature maps of each stain, any subset of stains to any other."""

    name: Literal["translator"] = "translator"
    # this project's own pyramid, the only one surely without statistics over the image, or the name of a timm model
    backbone: str = "conv"
    # one for chromatin and one for all proteins, told the marker (within "conv", at the outputs of timm's), or one each
    encoders: Literal["modality", "marker"] = "modality"
    channels: Channels = (32, 48, 64, 96)  # of the levels at 1/2, 1/4, ... of the resolution
    # of the channels of every level, at least one; the rest, at least one, is specific
    shared_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.75
    # of the visible stains' shared maps: a mean with a learnt weight for every marker and channel, or a product of
    # Gaussian experts
    fusion: Literal["mean", "product"] = "mean"
    head: Literal["mean", "laplace", "gaussian"] = "mean"  # the last two also predict a scale a pixel
    error: Literal["l1", "l2"] = "l2"  # of a mean head and of the sharp output
    marker_dim: Count = 32
    chromatin_only: Probability = 0.6  # of the cells show chromatin alone: the usual question in use
    hide: Probability = 0.5  # of the stains of the other cells; one always stays visible
    visible_proteins: Count | None = 2  # at most so many of a cell's proteins are shown in a step; None: all
    hidden_proteins: Count | None = 4  # at most so many hidden stains of a cell are predicted in a step; None: all
    rebuilt: Probability = 1.0  # of the visible stains are drawn again in a step, for full and shared
    # At most so many cells of a part of a batch are translated, for sharp, adversarial, patch_nce (and its
    # identity) and cycle; None: all.
    translated: Count | None = None
    latent_noise: Weight = 0.0  # standard deviation of noise on the maps; product: on the specific ones alone
    weights: TranslatorWeights = dataclasses.field(default_factory=TranslatorWeights)
    # the part of the training before which patch_nce, adversarial, sharp and cycle rest
    translation_from: Fraction = 0.0
    agreement: Literal["infonce", "triplet"] = "infonce"
    independence: Literal["hsic", "cross_covariance"] = "hsic"
    temperature: Positive = 0.07  # of patch_nce
    patches: Count = 64  # positions a level, of patch_nce
    negatives: Literal["image", "batch"] = "image"  # of patch_nce
    adversarial: Adversarial = "lsgan"
    discriminator_channels: Channels = (32, 64, 128)
    discriminator_sees_source: bool = True  # it judges (source, stain) pairs: for cells stained together
    epochs: Count = 60
    lr: Positive = 1e-3
    lr_discriminator: Positive = 1e-3
    lr_decay: Probability = 0.5  # the last part of the training, over which the learning rates fall to zero


@dataclass(config=CLOSED, frozen=True)
class LinearConfig:
    """linear: ridge regression of each stain's pixel on Gaussian blurs of the sources; the floor."""

    name: Literal["linear"] = "linear"
    sources: tuple[str, ...] | None = None  # None: chromatin
    sigmas: Annotated[tuple[Weight, ...], Field(min_length=1)] = (0, 1, 2, 4, 8, 16, 32)  # px
    ridge: Positive = 1e-5  # relative to the mean squared feature
    pixels: Count = 256  # of each crop that are fitted on


@dataclass(config=CLOSED, frozen=True)
class RegressionConfig:
    """regression: a U-Net (Ronneberger, Fischer & Brox 2015) from the sources to every other stain."""

    name: Literal["regression"] = "regression"
    sources: tuple[str, ...] | None = None  # None: chromatin
    channels: Channels = (16, 32, 64, 128)
    error: Literal["l1", "l2", "laplace", "gaussian"] = "l2"  # the last two also predict a scale a pixel
    epochs: Count = 60
    lr: Positive = 1e-3
    lr_decay: Probability = 0.5


@dataclass(config=CLOSED, frozen=True)
class Pix2pixConfig:
    """pix2pix (Isola, Zhu, Zhou & Efros 2017)."""

    name: Literal["pix2pix"] = "pix2pix"
    sources: tuple[str, ...] | None = None  # None: chromatin
    channels: Channels = (32, 64, 128, 256, 256)  # one 4x4 stride-2 convolution each
    dropout: Fraction = 0.5  # of the innermost three levels, the paper's noise; off in prediction
    discriminator_channels: Channels = (32, 64, 128)
    adversarial: Adversarial = "bce"
    l1_weight: Weight = 100.0
    r1_weight: Weight = 0.0
    epochs: Count = 60
    lr: Positive = 2e-4
    lr_discriminator: Positive = 2e-4
    lr_decay: Probability = 0.5


@dataclass(config=CLOSED, frozen=True)
class CutConfig:
    """CUT and FastCUT (Park, Efros, Zhang & Zhu 2020): one-sided, unpaired translation of one source stain."""

    name: Literal["cut"] = "cut"
    source: str | None = None  # None: chromatin
    width: Count = 32  # channels of the generator's first convolution
    blocks: Count = 6  # residual ones
    nce_layers: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the generator: image, two halvings, first and middle block
    nce_weight: Weight = 1.0  # 10 in FastCUT
    identity_weight: Weight = 1.0  # NCE of a real stain translated to itself, relative to the other; 0 in FastCUT
    temperature: Positive = 0.07
    patches: Count = 256
    negatives: Literal["image", "batch"] = "image"
    flip_equivariance: bool = False  # FastCUT
    discriminator_channels: Channels = (32, 64, 128)
    adversarial: Adversarial = "lsgan"
    r1_weight: Weight = 0.0
    epochs: Count = 60
    lr: Positive = 2e-4
    lr_discriminator: Positive = 2e-4
    lr_decay: Probability = 0.5


@dataclass(config=CLOSED, frozen=True)
class CycleGanConfig:
    """CycleGAN (Zhu, Park, Isola & Efros 2017) between one source stain and the others."""

    name: Literal["cyclegan"] = "cyclegan"
    source: str | None = None  # None: chromatin
    width: Count = 32
    blocks: Count = 6
    cycle_weight: Weight = 10.0
    identity_weight: Weight = 0.5  # relative to cycle_weight; 0 where that is 0
    buffer: Annotated[int, Field(ge=0)] = 50  # earlier translations that the discriminators are shown again
    discriminator_channels: Channels = (32, 64, 128)
    adversarial: Adversarial = "lsgan"
    r1_weight: Weight = 0.0
    epochs: Count = 60
    lr: Positive = 2e-4
    lr_discriminator: Positive = 2e-4
    lr_decay: Probability = 0.5


@dataclass(config=CLOSED, frozen=True)
class MvaeConfig:
    """Multimodal variational autoencoder with a product of experts (Wu & Goodman 2018)."""

    name: Literal["mvae"] = "mvae"
    channels: Channels = (32, 64, 128, 96)  # one 4x4 stride-2 convolution each
    latent_dim: Count = 128
    marker_dim: Count = 64
    likelihood: Literal["bce", "mse"] = "bce"
    beta: Weight = 1.0
    anneal: Probability = 0.25  # the first part of the training, over which beta rises from 0
    # Decodings of the posterior in prediction, whose spread is the predicted scale of a pixel; 0: no scale.
    draws: Annotated[int, Field(ge=0)] = 0
    subsets: Annotated[int, Field(ge=0)] = 1  # random subsets a step, beside all stains and each stain alone
    proteins_per_step: Count | None = None  # None: all of a cell's proteins in every step
    epochs: Count = 60
    lr: Positive = 1e-3
    lr_decay: Probability = 0.5


def _name(method: object) -> str:
    """Return the name that tells the methods apart; without one it is apollo, as without any method."""
    return str(method.get("name", "apollo") if isinstance(method, dict) else getattr(method, "name", method))


MethodConfig = Annotated[
    Annotated[ApolloConfig, Tag("apollo")]
    | Annotated[TranslatorConfig, Tag("translator")]
    | Annotated[LinearConfig, Tag("linear")]
    | Annotated[RegressionConfig, Tag("regression")]
    | Annotated[Pix2pixConfig, Tag("pix2pix")]
    | Annotated[CutConfig, Tag("cut")]
    | Annotated[CycleGanConfig, Tag("cyclegan")]
    | Annotated[MvaeConfig, Tag("mvae")],
    Discriminator(_name),
]
