"""Do predicted stains measure like real ones? Per-cell features, and the differences between conditions in them.

What a biologist publishes is seldom a picture: it is that a stain's area, place, texture or foci differ between
conditions. So each feature is correlated across cells, real against predicted, and each difference between the classes
of a label is measured twice, on real and on predicted stains of the same held-out cells. Both are measured about each
cell's own outline, as is done in the field, and that outline alone moves features: so a third time on the marker's mean
picture, which knows nothing of a cell. What that shows again, a prediction need not have known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared import metrics
from imgshared.data.features import EXTENT_NAMES, STAIN_NAMES
from imgshared.data.panel import Panel
from imgshared.evaluation.collect import COMPARED, MEAN, Part
from imgshared.evaluation.labels import Label

Table = NDArray[np.float32]
NAMES = (*STAIN_NAMES, *EXTENT_NAMES)
FAMILIES = {
    "stain_": "area and shape",
    "ring": "radial distribution",
    "log_ratio": "radial distribution",
    "texture": "texture",
    "spot": "foci",
}  # by the beginning of a feature's name; the others: brightness
SMALL = 0.2  # Cohen's d below which a difference is not called one (Cohen 1988: "small")
AGAIN, REVERSED, MISSED, INVENTED, NEITHER = "again", "reversed", "missed", "in the prediction alone", "in neither"


def family(feature: str) -> str:
    """Return what a feature of `NAMES` tells of."""
    return next((told for prefix, told in FAMILIES.items() if feature.startswith(prefix)), "brightness")


def correlate(part: Part, panel: Panel, groups: NDArray[Any]) -> pd.DataFrame:
    """Correlate each feature across cells, real against predicted.

    Returns
    -------
    One row a marker x feature: `family`, Spearman `value` with its interval over groups (`low`, `high`), `cells`; NaN
    where the feature does not vary.
    """
    rows = []
    for marker, cells, real, predicted, _ in _measured(part, panel):
        at = groups[cells]
        for k, name in enumerate(NAMES):
            found = metrics.estimate(
                at, metrics.correlation(at, real[:, k], predicted[:, k], ranks=True), metrics.SIGNED
            )
            rows.append({"marker": marker, "feature": name, "family": family(name), **found._asdict()})
            rows[-1]["cells"] = len(cells)
    return pd.DataFrame(rows)


def differ(part: Part, panel: Panel, label: Label, groups: NDArray[Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure every difference between the classes of a label, on real and on predicted stains.

    With two classes the second against the first, with more each against the rest. A difference is one where its
    interval over groups leaves out zero and Cohen's d is at least 0.2. Both d are in deviations of the *real* cells:
    predicted ones vary less, and in their own unit small differences would look large.

    Returns
    -------
    effects
        One row a contrast x marker x feature: `family`, Cohen's d `real`, `predicted` and `mean_picture`, each with
        `_low` and `_high`, and `outcome`: found ``again`` with the same sign, ``reversed``, ``missed``, ``in the
        prediction alone``, ``in neither``; `by_outline`, whether the mean picture shows the real difference again.
    conditions
        One row a contrast x marker: how many `features`, how many `differ` in real stains, how many of these are found
        `again`, `reversed` and `missed`, how many differ in the prediction `alone`; `by_outline`, how many of the real
        differences the mean picture shows again; `same_sign`, the share of the real differences whose predicted d has
        their sign; `slope` of predicted on real effects through the origin (1: as large, 0: gone); `ranking`, the
        Spearman correlation of the effects over the features, with its interval.
    """
    effects: list[dict[str, Any]] = []
    conditions: list[dict[str, Any]] = []
    for marker, cells, *stains in _measured(part, panel):
        known = label.codes[cells] >= 0
        codes, at = label.codes[cells][known], groups[cells][known]
        for name, positive in _contrasts(label, codes):
            if min(positive.sum(), (~positive).sum()) < 2:
                continue
            row = {"label": label.name, "contrast": name, "marker": marker}
            unit = stains[0][known].T
            sides = [
                [metrics.effect_size(at, positive, x, over) for x, over in zip(values[known].T, unit, strict=True)]
                for values in stains
            ]
            here = []
            for feature, *statistics in zip(NAMES, *sides, strict=True):
                a, b, mean = (metrics.estimate(at, s) for s in statistics)
                here.append({**row, "feature": feature, "family": family(feature), **_named("real", a),
                             **_named("predicted", b), **_named("mean_picture", mean), "outcome": _outcome(a, b),
                             "by_outline": _outcome(a, mean) == AGAIN})  # fmt: skip
            effects += here
            ranking = metrics.estimate(at, metrics.rank_agreement(*_varying(sides[:2], at)), metrics.SIGNED)
            conditions.append({**row, **_count(pd.DataFrame(here)), **_named("ranking", ranking)})
    return pd.DataFrame(effects), pd.DataFrame(conditions)


def _measured(part: Part, panel: Panel) -> Iterator[tuple[str, NDArray[np.intp], Table, Table, Table]]:
    """Yield (marker, cells with it and chromatin, their real and predicted features, those of the mean picture)."""
    for marker in panel.proteins:
        cells = np.flatnonzero(part.measured[:, panel.index(marker)] & part.measured[:, panel.chromatin_index])
        if len(cells):
            real, predicted = (part.morphology[marker, given][cells] for given in COMPARED)
            mean = part.morphology.get((marker, MEAN))
            yield marker, cells, real, predicted, np.full_like(real, np.nan) if mean is None else mean[cells]


def _contrasts(label: Label, codes: NDArray[np.intp]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    if len(label.classes) == 2:
        yield f"{label.classes[1]} − {label.classes[0]}", codes == 1
        return
    for k, name in enumerate(label.classes):
        yield f"{name} − rest", codes == k


def _named(name: str, value: metrics.Estimate) -> dict[str, float]:
    return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}


def _sign(d: metrics.Estimate) -> int:
    """Return the sign of a difference, 0 where there is none; one group has no interval, and its size must do."""
    clear = np.isnan(d.low) or d.low > 0 or d.high < 0
    return int(np.sign(d.value)) if clear and abs(d.value) >= SMALL else 0


def _outcome(real: metrics.Estimate, predicted: metrics.Estimate) -> str:
    a, b = _sign(real), _sign(predicted)
    if a:
        return {a: AGAIN, -a: REVERSED}.get(b, MISSED)
    return INVENTED if b else NEITHER


def _varying(sides: list[list[metrics.Statistic]], groups: NDArray[Any]) -> list[list[metrics.Statistic]]:
    """Leave out features that are constant in real cells: nothing measures their effects, which share that unit."""
    once = np.ones((1, len(np.unique(groups))))
    kept = [k for k, statistic in enumerate(sides[0]) if np.isfinite(statistic(once)[0])]
    return [[side[k] for k in kept] for side in sides]


def _count(effects: pd.DataFrame) -> dict[str, Any]:
    outcome = effects["outcome"]
    again, turned, missed, alone = ((outcome == o).sum() for o in (AGAIN, REVERSED, MISSED, INVENTED))
    real, predicted = (effects[name].fillna(0.0).to_numpy() for name in ("real", "predicted"))
    differing = outcome.isin([AGAIN, REVERSED, MISSED]).to_numpy()
    same = np.sign(real[differing]) == np.sign(predicted[differing])
    energy = float((real**2).sum())
    return {
        "features": len(effects), "differ": int(differing.sum()), "again": int(again), "reversed": int(turned),
        "missed": int(missed), "alone": int(alone), "by_outline": int(effects["by_outline"].sum()),
        "same_sign": float(same.mean()) if len(same) else np.nan,
        "slope": float((real * predicted).sum() / energy) if energy > 0 else np.nan,
    }  # fmt: skip
