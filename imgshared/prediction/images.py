"""Whole images: fields and tiles of any size, with the weights that were trained on crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imgshared.prediction.run import Run
from imgshared.prediction.types import Floats
from imgshared.types import InputError


@torch.inference_mode()
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
        (C, Y, X) raw intensities, of any size, at the model's pixel size.
    channels
        The marker of each channel, by name or alias; others than the model's are not used.
    markers
        Stains to predict, in this order; None is every protein of the model.
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
        Where a source is not among the channels, a name is unknown, the method knows crops alone, or has no sharp
        output.
    """
    if not run.method.any_size:
        raise InputError(
            f"{run.experiment.method.name} predicts crops of {run.contract.crop_px} px alone: use `predict` on a store "
            "of crops, or train translator, regression, pix2pix, cut, cyclegan or linear"
        )
    run.refuse_sharp(sharp)
    if image.ndim != 3 or len(image) != len(channels):
        raise InputError(f"an image of shape {image.shape} is not (C, Y, X) with the {len(channels)} channels named")
    chosen = run.source_mask(sources)
    place = {run.panel.find(name): c for c, name in enumerate(channels)}
    raw = np.zeros((len(run.panel), *image.shape[1:]), np.float32)
    for target in chosen.nonzero()[:, 0].tolist():
        if target not in place:
            raise InputError(
                f"the image has no {run.panel.markers[target]}, which the prediction starts from; it has "
                f"{', '.join(channels)}"
            )
        raw[target] = image[place[target]]
    device = run.fabric.device
    normalised = run.normaliser.forward(torch.from_numpy(raw).to(device))[None] * chosen.to(device)[:, None, None]
    targets = run.panel.indices(markers or run.panel.proteins)
    with run.fabric.autocast():
        batch = normalised.contiguous(memory_format=torch.channels_last)
        prediction = run.method.translate(batch, chosen.to(device)[None], targets)
        predicted = (prediction.sharp() if sharp and prediction.sharp else prediction.mean)[0]
    return np.asarray(run.normaliser.select(targets).inverse(predicted.float()).cpu().numpy(), np.float32)
