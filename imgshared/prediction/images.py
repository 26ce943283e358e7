"""Whole images: fields and tiles of any size, with the weights that were trained on crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imgshared.data.normalise import Normaliser
from imgshared.prediction.run import Run
from imgshared.prediction.trust import Trust
from imgshared.prediction.types import Floats
from imgshared.types import InputError


def predict_image(
    run: Run,
    image: NDArray[Any],
    channels: Sequence[str],
    *,
    markers: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    sharp: bool = False,
) -> Floats:
    """Predict stains of a whole image at once.

    Parameters
    ----------
    image
        (C, Y, X) raw intensities as in the model's store, of its dtype; of any size, at the model's pixel size.
    channels
        The marker of each channel, by name or alias; others than the model's are not used.
    markers
        Stains to predict, in this order; None is every protein that is no source.
    sources
        Stains to predict from; None is those that the method is bound to, else chromatin.
    sharp
        The sharp output instead of the mean, of a method that has one.

    Returns
    -------
    (T, Y, X) float32, raw intensities.

    Raises
    ------
    InputError
        Where the dtype is another, a source is not among the channels, or twice, a name is unknown, the method knows
        crops alone, or has no sharp output.
    """
    run.refuse_crops_alone()
    run.refuse_sharp(sharp)
    if image.ndim != 3 or len(image) != len(channels):
        raise InputError(f"an image of shape {image.shape} is not (C, Y, X) with the {len(channels)} channels named")
    if image.dtype.name != run.contract.dtype:
        raise InputError(
            f"the image has {image.dtype} pixels, the model was trained on {run.contract.dtype}: give raw intensities "
            "as they were in training, not scaled ones"
        )
    given = run.source_mask(sources)
    chosen = given.nonzero()[:, 0].tolist()
    places = [_place(run, source, channels) for source in chosen]
    return draw_image(run, image[places], chosen, run.target_channels(markers, given), sharp=sharp)


def _place(run: Run, source: int, channels: Sequence[str]) -> int:
    marker = run.panel.markers[source]
    places = [c for c, name in enumerate(channels) if run.panel.find(name) == source]
    if not places:
        raise InputError(f"the image has no {marker}, which the prediction starts from; it has {', '.join(channels)}")
    if len(places) > 1:
        raise InputError(
            f"{' and '.join(channels[c] for c in places)} are all {marker}, which the prediction starts from: give one"
        )
    return places[0]


@torch.inference_mode()
def draw_image(
    run: Run,
    image: NDArray[Any],
    sources: Sequence[int],
    targets: Sequence[int],
    *,
    sharp: bool = False,
    trust: Trust | None = None,
) -> Floats:
    """Draw the stains `targets` from the (S, Y, X) raw intensities of the stains `sources`, in raw intensities too.

    Returns
    -------
    (T, Y, X) float32; with `trust` (2 T, Y, X), the targets and the half widths of their pixels' intervals.
    """
    device = run.fabric.device
    raw = torch.zeros(len(run.panel), *image.shape[1:], device=device)
    raw[list(sources)] = torch.from_numpy(image.astype(np.float32)).to(device)
    given = torch.zeros(len(run.panel), dtype=torch.bool, device=device)
    given[list(sources)] = True
    normalised = run.normaliser.forward(raw)[None] * given[:, None, None]
    with run.fabric.autocast():
        batch = normalised.contiguous(memory_format=torch.channels_last)
        prediction = run.translate(batch, given[None], targets)
        drawn = prediction.sharp() if sharp and prediction.sharp else prediction.mean
    normaliser = run.normaliser.select(targets)
    mean = drawn[0].float().cpu()
    found = normaliser.inverse(mean)
    if trust is not None:
        driver = mean if prediction.scale is None else prediction.scale[0].float().cpu()
        half = np.stack([trust.half_widths(d.numpy(), t) for d, t in zip(driver, targets, strict=True)])
        found = torch.cat([found, in_raw(mean, torch.from_numpy(half), normaliser)])
    return np.asarray(found.numpy(), np.float32)


def in_raw(mean: Tensor, half: Tensor, normaliser: Normaliser) -> Tensor:
    """Half of what lies between as much above and below the mean, in raw units."""
    return (normaliser.inverse(mean + half) - normaliser.inverse(mean - half)) / 2
