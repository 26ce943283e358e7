"""A small timm network as a classifier of crops, trained from scratch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from imgshared.training.devices import has_bf16
from imgshared.types import InputError

BATCH = 64
LEARNING_RATE = 2e-3


def cnn_probabilities(
    train: NDArray[Any],
    truth: NDArray[np.intp],
    test: NDArray[Any],
    classes: int,
    *,
    model: str = "resnet10t",
    epochs: int = 15,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Train on (n, K, Y, X) crops, any number of channels K, and return the class probabilities of the test crops.

    AdamW under a one-cycle schedule, cross-entropy with balanced classes, random mirror images, rotations and scales.
    Brightness is scaled by the training crops alone. The same seed gives the same network on the same machine.

    Returns
    -------
    (m, classes) float, rows sum to one.

    Raises
    ------
    InputError
        Where timm knows no such model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    centre = train.mean((0, 2, 3), dtype=np.float64)
    scale = np.maximum(train.std((0, 2, 3), dtype=np.float64), 1e-6)

    def load(images: NDArray[Any], rows: Any) -> Tensor:
        x = (images[rows] - centre[:, None, None]) / scale[:, None, None]
        return torch.as_tensor(x, dtype=torch.float32, device=device).contiguous(memory_format=torch.channels_last)

    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):  # the weights are drawn from our seed, the caller's stream is left alone
        torch.manual_seed(seed)
        network = _build(model, train.shape[1], classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        counts = np.bincount(truth, minlength=classes)
        weight = torch.as_tensor(len(truth) / (classes * np.maximum(counts, 1)), dtype=torch.float32, device=device)
        optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        steps = max(len(train) // BATCH, 1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps * epochs)
        network.train()
        for _ in range(epochs):
            order = rng.permutation(len(train))
            for step in range(steps):  # a rest of less than a batch waits for the next epoch's order
                rows = order[step * BATCH : (step + 1) * BATCH]
                target = torch.as_tensor(truth[rows], dtype=torch.int64, device=device)
                with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device.type)):
                    loss = F.cross_entropy(network(_augment(load(train, rows), rng)).float(), target, weight)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    network.eval()
    with torch.inference_mode():
        blocks = [load(test, slice(i, i + 256)) for i in range(0, len(test), 256)]
        logits = [network(block).float().cpu() for block in blocks]
    return torch.cat(logits).double().softmax(1).numpy()


def _build(model: str, channels: int, classes: int) -> nn.Module:
    import timm

    try:
        network: nn.Module = timm.create_model(model, pretrained=False, in_chans=channels, num_classes=classes)
    except RuntimeError as error:
        near = timm.list_models(f"*{model[:6]}*")[:3]
        raise InputError(f"cnn: timm knows no model {model!r}. Near: {', '.join(near) or 'none'}") from error
    return network


def _augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirror, rotate by any angle and scale by up to a tenth, each crop by itself."""
    n = len(images)
    angle, scale = rng.uniform(0, 2 * np.pi, n), rng.uniform(0.9, 1.1, n)
    mirror = rng.choice([-1.0, 1.0], n)
    theta = np.zeros((n, 2, 3))
    theta[:, 0, :2] = np.stack([np.cos(angle) * mirror, -np.sin(angle)], 1) / scale[:, None]
    theta[:, 1, :2] = np.stack([np.sin(angle) * mirror, np.cos(angle)], 1) / scale[:, None]
    grid = F.affine_grid(torch.as_tensor(theta, dtype=images.dtype, device=images.device), list(images.shape), False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
