"""How `benchmark_methods.py` scores predictions; its `--help` says what each score is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from imgshared import metrics
from imgshared.data.features import Frame, central_frame, stain_features
from imgshared.data.normalise import Normaliser
from imgshared.data.panel import Panel
from imgshared.evaluation.agreement import Reader, Standard, feature_distance

READABLE = 0.1  # above chance: what a classifier must read from real stains for its answers to count
READ = ("classes", "weights", "bias", "truth")


def in_units(images: NDArray[np.float32], theirs: Normaliser, ours: Normaliser) -> NDArray[np.float32]:
    """Bring normalised images to the units of another normaliser: seeds may draw other cells for theirs."""
    if theirs == ours:
        return images
    return np.asarray(ours.forward(theirs.inverse(torch.from_numpy(images))).numpy())


def score(
    real: NDArray[np.float32],
    predicted: NDArray[np.float32],
    measured: NDArray[np.bool_],
    panel: Panel,
    shared: Any,
    labels: list[tuple[str, list[str]]],
) -> list[dict[str, Any]]:
    """Return a row a protein; see `benchmark_methods.py` for what each score is."""
    rows = []
    for marker in panel.proteins:
        c = panel.index(marker)
        cells = measured[:, c]
        a, b = real[cells, c], predicted[cells, c]
        r, linear = np.nan_to_num(metrics.pearson(a, b)), shared[f"{marker}/linear"]
        standard = Standard(shared[f"{marker}/mean"], shared[f"{marker}/sd"])
        x, y = shared[f"{marker}/real"], stain_features(b, frame_of(b, float(shared["radius"])))
        row = {
            "marker": marker,
            "cells": int(cells.sum()),
            "pearson": r.mean(),
            "pearson_pooled": np.nan_to_num(metrics.pearson(a.reshape(1, -1), b.reshape(1, -1)))[0],
            "pearson_linear": linear.mean(),
            "gain": (r - linear).mean(),
            "ssim": metrics.ssim(a, b).mean(),
            "spectral_ratio": np.nanmedian(metrics.spectral_ratio(a, b)),
            "intensity_spearman": np.nan_to_num(spearmanr(a.mean((1, 2)), b.mean((1, 2))).statistic),
            "kid": feature_distance(x, y, standard),
        }
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
        rows[-1]["labels"] = [
            answers(label, standard(x), standard(y), {k: shared[f"{marker}/{label}/{k}"] for k in READ})
            for label, _ in labels
        ]
    return rows


def answers(
    label: str, real: NDArray[np.float64], predicted: NDArray[np.float64], kept: dict[str, NDArray[Any]]
) -> dict[str, Any]:
    """Compare a classifier's answers on real and predicted stains of the cells that have the label."""
    reader = Reader(kept["classes"], kept["weights"], kept["bias"])
    known = kept["truth"] != ""
    truth, x, y = kept["truth"][known], real[known], predicted[known]
    one, other = reader(x), reader(y)
    return {
        "label": label,
        "cells": int(known.sum()),
        "kappa": float(metrics.kappa(np.zeros(len(one)), one, other)(np.ones((1, 1)))[0]),
        "agreement": float((one == other).mean()),
        "accuracy_real": reader.accuracy(x, truth),
        "accuracy_predicted": reader.accuracy(y, truth),
        "readable": bool(reader.accuracy(x, truth) >= 1 / len(reader.classes) + READABLE),
    }


def frame_of(images: NDArray[np.float32], radius: float) -> Frame:
    """Return the frame of (n, Y, X) crops, the same for every cell."""
    return central_frame(len(images), images.shape[-1], radius)
