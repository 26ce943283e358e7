"""What each command can be told: one closed dataclass a command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from imgshared.config.methods import ApolloConfig, MethodConfig
from imgshared.config.terms import CLOSED, Count, Fraction, Length, Positive, Weight


@dataclass(config=CLOSED, frozen=True)
class SegmentConfig:
    """Nuclei on the chromatin channel, for images without a label mask. Lengths are "6 um" or "12 px"."""

    smooth: Length = "1 px"  # Gaussian before the threshold
    background: Length = "60 px"  # radius of the rolling background; larger than a nucleus
    threshold: Literal["otsu", "local", "li"] = "otsu"
    threshold_scale: Positive = 1.0  # below 1 finds dimmer nuclei
    min_diameter: Length = "10 px"
    max_diameter: Length = "80 px"
    split: Length = "10 px"  # least distance between two nuclei's centres


@dataclass(config=CLOSED, frozen=True)
class PrepareConfig:
    """From a manifest and images to a cell store."""

    crop_px: Annotated[int, Field(ge=8)] = 64
    pixel_size_um: Positive | None = None  # resample every image to this pixel size; None keeps the images' own
    source_pixel_size_um: Positive | None = None  # where the images do not say
    chromatin: str | None = None  # the chromatin marker; None finds DNA, DAPI, Hoechst, ...
    markers: tuple[str, ...] | None = None  # keep these; None keeps all
    channels: tuple[str, ...] | None = None  # channel names in file order, where neither OME nor manifest names them
    aliases: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    image_column: str | None = None  # None finds image, file, path, filename, ...
    mask_column: str | None = None
    group_column: str | None = None  # None finds group, donor, patient, slide, Metadata_Well, ...
    pattern: str | None = None  # images that are folders: e.g. "{channel}.tif" or "*_{channel}.png"
    cells: Path | None = None  # a table with columns image, label and anything to be joined into obs
    cells_image_column: str | None = None
    cells_label_column: str | None = None
    mask_neighbours: bool = False  # zero the pixels of other cells in a crop; a model of such cells predicts no slides
    segment: SegmentConfig = dataclasses.field(default_factory=SegmentConfig)
    qc: bool = True  # write a picture of the outlines for each image


@dataclass(config=CLOSED, frozen=True)
class SimulateConfig:
    """Simulated multiplexed images with known shared and specific factors."""

    cells: Count = 1500
    donors: Count = 8
    scenario: Literal["independent", "entangled"] = "independent"
    field_px: Annotated[int, Field(ge=128)] = 384
    pixel_size_um: Positive = 0.5
    seed: int = 0


@dataclass(config=CLOSED, frozen=True)
class SplitConfig:
    """Which groups train, which stop the training early (val), which are only reported on (test).

    `val` and `test` are a fraction of the groups or a list of values of the column `by`.
    """

    by: str = "group"
    val: Fraction | tuple[str, ...] = 0.15
    test: Fraction | tuple[str, ...] = 0.2
    stratify: str | None = None  # an obs column whose values every part should hold
    seed: int = 0  # draws the groups of a fraction; the training's own seed leaves them as they are


@dataclass(config=CLOSED, frozen=True)
class NormaliseConfig:
    """Raw intensity to about [0, 1], per marker, fitted on the training groups and inverted on output."""

    transform: Literal["linear", "sqrt", "arcsinh"] = "linear"
    cofactor: Positive = 5.0  # of arcsinh: linear below, logarithmic above
    low: Annotated[float, Field(ge=0, lt=100)] = 0.1  # percentile that maps to 0
    high: Annotated[float, Field(gt=0, le=100)] = 99.9  # percentile that maps to 1


@dataclass(config=CLOSED, frozen=True)
class AugmentConfig:
    """Training-time changes. Geometry is the same for all channels of a cell, intensity differs by channel.

    apollo's latents belong to one picture of a cell: its geometry must stay off; its intensity noise acts in stage 2.
    """

    flips: bool = False  # mirror images and right angles
    rotate_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0  # up to this fraction larger or smaller
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.0  # up to this fraction of the crop
    gain: Annotated[float, Field(ge=0, lt=1)] = 0.0  # multiply a channel by 1 +- gain
    noise: Annotated[float, Field(ge=0)] = 0.0  # standard deviation of added Gaussian noise, normalised units


@dataclass(config=CLOSED, frozen=True)
class TrainConfig:
    """How the loop runs."""

    batch_size: Count = 64  # cells a step, over all devices together
    accumulate: Count = 1  # parts, one after the other, in which each device takes its share of a batch: less memory
    # panels: a batch holds as many cells of each panel that occurs, but no cell more than 10 times an epoch
    balance: Literal["cells", "panels"] = "cells"
    ema: Fraction = 0.0  # decay a step of the averaged weights that predict; 0: no average
    gradient_clip: Weight = 0.0  # greatest norm of a player's gradient; 0: none
    precision: Literal["auto", "float32", "bf16"] = "auto"  # auto: bf16 where the hardware has it
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # None: an epoch is every cell once; else it ends after so many steps, so that of very many cells each epoch is
    # another random part, and validations and rates follow steps
    steps_per_epoch: Count | None = None
    residency: Literal["auto", "device", "memory", "stream"] = "auto"  # where the crops live while training
    validate_every: Count = 1  # epochs
    patience: Count = 15  # validations without improvement before a stage ends early
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0
    log_every: Count = 10  # steps
    diverged: Positive = 10.0  # stop where the smoothed loss exceeds its best by this factor


@dataclass(config=CLOSED, frozen=True)
class Experiment:
    """One complete training run."""

    data: Path
    seed: int = 0  # of the weights, and of the order of the cells
    ensemble: tuple[int, ...] = ()  # seeds of the members of a run that `imgshared ensemble` made; training takes none
    markers: tuple[str, ...] | None = None  # None: all of the store's
    unstained: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # as if groups lacked a marker
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)
    normalise: NormaliseConfig = dataclasses.field(default_factory=NormaliseConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    method: MethodConfig = dataclasses.field(default_factory=ApolloConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


@dataclass(config=CLOSED, frozen=True)
class PredictConfig:
    """What to predict, from which stains."""

    markers: tuple[str, ...] | None = None  # None: every protein of the model
    sources: tuple[str, ...] | None = None  # None: those that the method is bound to, else chromatin
    intervals: bool = False  # also the half width of each pixel's 90% interval, calibrated on the validation groups
    scale: bool = False  # also the predicted spread of each pixel, where the method has one
    sharp: bool = False  # also each prediction with texture, where the method has such an output
    full: bool = False  # also each measured stain rebuilt from all of its latents
    shared: bool = False  # also each measured stain rebuilt from its own shared latent
    ome_tiff: bool = False  # also one OME-TIFF an image, for a viewer
    batch_size: Count = 256


@dataclass(config=CLOSED, frozen=True)
class SlideConfig:
    """What to predict of a whole slide or plate, and how it is read."""

    markers: tuple[str, ...] | None = None  # None: every protein of the model
    sources: tuple[str, ...] | None = None  # None: those that the method is bound to, else chromatin
    channels: tuple[str, ...] | None = None  # channel names in file order, in place of those that the image gives
    pixel_size_um: Positive | None = None  # in place of what the image says
    resample: bool = False  # bring an image of another pixel size to the model's
    normaliser: Literal["checkpoint", "slide"] = "checkpoint"  # slide: percentiles of its sources from the whole slide
    # Outside of tissue predicted pixels are 0: otsu finds it on a thumbnail of the first source; or a mask's path.
    tissue: str | None = None
    measured: bool = False  # also the slide's own channels, to look at beside the predicted ones
    sharp: bool = False  # the output with texture in place of the mean, where the method has one
    intervals: bool = False  # also the half width of each pixel's 90% interval, calibrated on the validation groups
    cells: str | None = None  # a label mask of the slide: also a table of measured and predicted intensities a cell
    dtype: Literal["auto", "uint8", "uint16", "float32"] = "auto"  # of the predicted pixels; auto: the slide's
    tile: Annotated[int, Field(ge=256, multiple_of=256)] = 1024  # px; memory grows with it, the result does not change
    skip_damaged: bool = False  # leave out what cannot be read, and what would be predicted from it, and say where


@dataclass(config=CLOSED, frozen=True)
class ExportConfig:
    """What an exported file predicts, from which stains."""

    markers: tuple[str, ...] | None = None  # None: every protein of the model
    sources: tuple[str, ...] | None = None  # None: those that the method is bound to, else chromatin
    sharp: bool = False  # the output with texture in place of the mean, where the method has one


@dataclass(config=CLOSED, frozen=True)
class EvaluateConfig:
    """What to report."""

    labels: tuple[str, ...] = ()  # obs columns for the classifier harness
    label_values: tuple[str, ...] | None = None  # keep cells with these values; None keeps all
    factors: tuple[str, ...] = ()  # numeric obs columns for the latent probes
    group: str = "group"  # unit of the intervals
    fold: str | None = None  # unit of the folds; None: the same as group
    folds: Annotated[int, Field(ge=2)] = 4
    # Classifiers learn in folds among the test groups ("test") or from the training groups ("train");
    # auto: in folds where there are enough test groups.
    train_on: Literal["auto", "test", "train"] = "auto"
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.05  # a loss of AUROC against the real stain that does not count
    classifiers: tuple[Literal["features", "cnn"], ...] = ("features",)
    cnn: str = "resnet10t"  # any timm model
    cnn_steps: Annotated[int, Field(ge=20)] = 600  # batches of 64 crops, at most, for each network
    refit: bool = False  # nested: train a normaliser, model and classifiers for each fold of groups
    sharp: bool = False  # judge the sharp output in place of the mean
    # A store that `imgshared predict` wrote, or an AnnData of another tool: judge its images, those of the run's model
    # otherwise; paths are relative to where the command runs.
    predictions: str | None = None
    allow_seen_groups: bool = False  # judge groups that trained the model, too; the report is marked as leaking
    max_cells: Count = 20000  # a part larger than this is sampled, and the report says so
    seed: int = 0
