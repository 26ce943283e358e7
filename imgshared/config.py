"""The whole configuration schema, and how a YAML file plus ``key=value`` overrides become one.

Every key has one place and one meaning; unknown keys are refused with the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from imgshared.types import InputError

CLOSED = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Length = Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?(um|µm|μm|px)$")]  # "6 um" or "12 px"


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
    mask_neighbours: bool = False  # zero the pixels of other cells in a crop
    segment: SegmentConfig = dataclasses.field(default_factory=SegmentConfig)
    qc: bool = True  # write a picture of the outlines for each image


@dataclass(config=CLOSED, frozen=True)
class SimulateConfig:
    """Simulated multiplexed images with known shared and specific factors."""

    cells: Annotated[int, Field(ge=1)] = 1500
    donors: Annotated[int, Field(ge=1)] = 8
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
class ApolloConfig:
    """apollo (Zhang, Shivashankar & Uhler, Nat Comput Sci 2026): latent optimisation, then encoders.

    The defaults suit 64-pixel crops; `configs/apollo_published.yaml` holds the published sizes.
    """

    name: Literal["apollo"] = "apollo"
    channels: tuple[int, ...] = (32, 64, 128, 96)  # one 4x4 stride-2 convolution each
    shared_channels: int = 80  # of the last ones; the rest feed the specific head
    shared_dim: Annotated[int, Field(ge=1)] = 128
    specific_dim: Annotated[int, Field(ge=0)] = 32  # 0: no specific latents (ablation)
    marker_dim: Annotated[int, Field(ge=1)] = 64
    likelihood: Literal["bce", "mse"] = "bce"
    shared_decoders: bool = True  # False: no D'_m (ablation)
    one_step: bool = False  # True: encoders and decoders at once, as a variational autoencoder (ablation)
    latent_noise: Annotated[float, Field(ge=0)] = 1.0  # standard deviation of e
    latent_init_std: Annotated[float, Field(ge=0)] = 0.1  # of the free latents at the start
    norm_weight: Annotated[float, Field(ge=0)] = 1e-3  # lambda
    kl_weight: Annotated[float, Field(ge=0)] = 1e-7  # one_step only
    match_weight: Annotated[float, Field(ge=0)] = 1.0  # one_step only: shared latents of a cell's stains agree
    proteins_per_step: Annotated[int, Field(ge=1)] | None = None  # None: all of a cell's proteins in every step
    latent_epochs: Annotated[int, Field(ge=1)] = 40  # stage 1 (all epochs with one_step)
    encoder_epochs: Annotated[int, Field(ge=1)] = 30  # stage 2
    lr_decoder: Positive = 1e-3
    lr_latent: Positive = 1e-1
    lr_encoder: Positive = 1e-3


MethodConfig = ApolloConfig


@dataclass(config=CLOSED, frozen=True)
class TrainConfig:
    """How the loop runs."""

    batch_size: Annotated[int, Field(ge=1)] = 64  # cells a step, over all devices together
    precision: Literal["auto", "float32", "bf16"] = "auto"  # auto: bf16 where the hardware has it
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    residency: Literal["auto", "device", "memory", "stream"] = "auto"  # where the crops live while training
    validate_every: Annotated[int, Field(ge=1)] = 1  # epochs
    patience: Annotated[int, Field(ge=1)] = 15  # validations without improvement before a stage ends early
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0
    log_every: Annotated[int, Field(ge=1)] = 10  # steps
    diverged: Positive = 10.0  # stop where the smoothed loss exceeds its best by this factor


@dataclass(config=CLOSED, frozen=True)
class Experiment:
    """One complete training run."""

    data: Path
    seed: int = 0
    markers: tuple[str, ...] | None = None  # None: all of the store's
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)
    normalise: NormaliseConfig = dataclasses.field(default_factory=NormaliseConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    method: MethodConfig = dataclasses.field(default_factory=ApolloConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


@dataclass(config=CLOSED, frozen=True)
class PredictConfig:
    """What to predict, from which stains."""

    markers: tuple[str, ...] | None = None  # None: every protein of the model
    sources: tuple[str, ...] | None = None  # None: chromatin
    full: bool = False  # also each measured stain rebuilt from all of its latents
    shared: bool = False  # also each measured stain rebuilt from its own shared latent
    ome_tiff: bool = False  # also one OME-TIFF an image, for a viewer
    batch_size: Annotated[int, Field(ge=1)] = 256


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
    classifiers: tuple[Literal["features", "cnn"], ...] = ("features",)
    cnn: str = "resnet10t"  # any timm model
    cnn_epochs: Annotated[int, Field(ge=1)] = 15
    max_cells: Annotated[int, Field(ge=1)] = 20000  # a part larger than this is sampled, and the report says so
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    seed: int = 0


T = TypeVar("T")


def load(kind: type[T], path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file, apply ``dotted.key=value`` overrides and validate.

    Raises
    ------
    InputError
        Names the dotted key and what is wrong with it, and for an unknown key the nearest valid one.
    """
    tree = _read_yaml(path) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{key}: cannot read {text!r} ({error})") from error
        _assign(tree, key.strip().split("."), value)
    return validate(kind, tree, str(path or "the command line"))


def validate(kind: type[T], tree: Mapping[str, Any], origin: str) -> T:
    """Turn plain data into a configuration; see `load`. PyYAML reads 2e-4 as a string: the schema makes it a number."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        raise InputError("\n".join(_explain(kind, e, origin) for e in error.errors())) from error


def dump(config: Any) -> str:
    """Return the resolved configuration as YAML that `load` reads back."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"no configuration at {path}") from error
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no keys")
    return tree


def _assign(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            raise InputError(f"{'.'.join(keys)}: {key} is a value, not a section")
        tree = below
    tree[keys[-1]] = value


_UNION_MEMBER = re.compile(r"float$|tuple\[|constrained-|function-")  # how pydantic marks which type of a union failed


def _explain(kind: type[Any], error: Any, origin: str) -> str:
    *above, last = map(str, error["loc"])
    names = [part for part in above if not _UNION_MEMBER.match(part)]
    unknown = error["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    names += [last] if unknown or not _UNION_MEMBER.match(last) else []
    dotted = ".".join(names)
    if unknown:
        known = sorted(keys(kind))
        close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5) or [
            k for k in known if k.rsplit(".", 1)[-1] == names[-1]
        ]
        return f"{origin}: unknown key {dotted!r}." + (f" Did you mean {close[0]!r}?" if close else "")
    if error["type"] in ("missing", "missing_argument"):
        return f"{origin}: the key {dotted!r} is missing"
    return f"{origin}: {dotted} = {error['input']!r}: {error['msg']}"


def keys(kind: type[Any], prefix: str = "") -> Iterable[str]:
    """Yield every dotted key of a configuration class."""
    for name, hint in get_type_hints(kind).items():
        inner = next((a for a in (hint, *get_args(hint)) if dataclasses.is_dataclass(a)), None)
        yield prefix + name
        if inner is not None and get_origin(hint) is not dict:
            yield from keys(inner, f"{prefix}{name}.")  # type: ignore[arg-type]
