"""What does a cell's outline tell through any picture? Simulated cells, one constant picture, two frames.

    python scripts/study_outlines.py OUT [--seed 1] [--cells 2400]

Features of a stain are measured "inside" and "outside" of something. About each cell's own outline even one picture for
all cells, the mean one, tells of the nuclear shape; in one frame for all cells it cannot. Grouped folds over donors;
AUROC of logistic regression, the classifier of `imgshared evaluate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown, record
from sklearn.model_selection import GroupKFold
from study_translator_simulated import stored

from imgshared import metrics
from imgshared.data.features import central_frame, frame, stain_features, typical_radius
from imgshared.data.normalise import fit_normaliser
from imgshared.data.store import CellStore
from imgshared.evaluation.labels import read_label
from imgshared.evaluation.solve import feature_probabilities

LABELS = ("treatment", "cell_type", "drug")


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cells", type=int, default=2400)
    parser.add_argument("--record", type=Path, default=None, help="JSON to write (default: OUT/outlines.json)")
    a = parser.parse_args()
    store = CellStore(stored(argparse.Namespace(out=a.out, cells=a.cells), a.seed))
    rows = [row for marker in store.panel.proteins for row in read(store, marker)]
    record(a.record or a.out / "outlines.json", {"cells": len(store), "seed": a.seed, "rows": rows})
    print(markdown(rows))


def read(store: CellStore, marker: str) -> list[dict[str, Any]]:
    """Return the AUROC of every label from the real stain and from its mean picture, in both frames."""
    channel = store.panel.index(marker)
    cells = np.flatnonzero(store.measured[:, channel])
    masks, groups = store.masks(cells), store.obs["group"].astype(str).to_numpy()[cells]
    raw = store.images(cells)[:, channel].astype(np.float32)
    normaliser = fit_normaliser(store, cells, [channel], transform="sqrt")
    real = ((np.sqrt(raw) - normaliser.low[0]) / (normaliser.high[0] - normaliser.low[0])).astype(np.float32)
    mean = np.broadcast_to(real.mean(0), real.shape)
    own, central = frame(masks), central_frame(len(cells), real.shape[-1], typical_radius(masks))
    found = {
        f"{name}, {place}": stain_features(images, where)
        for name, images in (("real", real), ("mean picture", mean))
        for place, where in (("own outline", own), ("one frame", central))
    }
    rows = []
    for name in LABELS:
        codes = read_label(store.obs.iloc[cells], name).codes
        told = {key: auroc(x, codes, groups) for key, x in found.items()}
        rows.append({"label": name, "stain": marker, **told})
    return rows


def auroc(x: np.ndarray[Any, Any], codes: np.ndarray[Any, Any], groups: np.ndarray[Any, Any]) -> float:
    """AUROC over grouped folds."""
    p = np.zeros((len(x), codes.max() + 1))
    for learn, test in GroupKFold(4).split(x, codes, groups):
        p[test] = feature_probabilities(x[learn], codes[learn], x[test], p.shape[1])
    return metrics.estimate(groups, metrics.auroc(groups, codes, p)).value


if __name__ == "__main__":
    main()
