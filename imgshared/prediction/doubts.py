"""What a user should know of a prediction, a sentence a trouble: `predict` warns with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgshared.data.store import CellStore
from imgshared.prediction.run import Run
from imgshared.prediction.trust import ODD

MOST = 0.5  # share of the cells that makes a prediction as a whole doubtful
# Between what staining, exposure and camera make of brightness (about 10 times) and what another scale does (8 for 16
# bits: 257 times, [0, 1] for counts: more).
APART = 30.0


def many_sources(run: Run, sources: Sequence[str] | None) -> list[str]:
    """Say that `sources` hold more proteins than the model was ever shown at once."""
    chosen, most = run.source_mask(sources).tolist(), run.method.most_proteins
    proteins = [m for m, c in zip(run.panel.markers, chosen, strict=True) if c and m != run.panel.chromatin]
    if most is None or len(proteins) <= most:
        return []
    return [
        f"sources=[...] holds {len(proteins)} proteins ({', '.join(proteins)}), and the training showed the model "
        f"{most} at once at most, so how it predicts from these is not known: name fewer, or train with "
        f"method.visible_proteins={len(proteins)}"
    ]


def other_scale(run: Run, store: CellStore, sources: Sequence[str] | None) -> list[str]:
    """Say which sources have intensities of another scale than those that the normaliser was fitted on.

    Either not even the brightest pixel of the store comes near what the training took for bright (1, normalised), and
    dim or rare stains have bright pixels, too; or one pixel in a hundred is far beyond it. A store that does not say
    its intensities is not judged.
    """
    known, chosen, said = store.info.get("intensity", {}), run.source_mask(sources).tolist(), list[str]()
    for channel, place in enumerate(run.contract.check(store, ())):
        seen = known.get(store.panel.markers[place]) if chosen[channel] and place is not None else None
        bright = run.normaliser.ends(channel)[1]
        if not seen or bright <= 0:
            continue
        if seen["max"] * APART < bright or seen["p99"] > APART * bright:
            said.append(
                f"{run.panel.markers[channel]}: intensities in {store.path} reach {seen['max']:.4g} (99th percentile "
                f"{seen['p99']:.4g}), those of the training about {bright:.4g}: what is predicted from another scale "
                "means nothing, so prepare the store from images in the units of the training's"
            )
    return said


def strange_cells(
    run: Run, odd: NDArray[np.floating[Any]], unsure: NDArray[np.bool_], targets: Sequence[int]
) -> list[str]:
    """Say that most cells are unlike the calibration's, or else of which stains most are better not predicted.

    Parameters
    ----------
    odd, unsure
        (n,) and (n, T), see `Trust.odd` and `Trust.abstain`; a cell whose `odd` is NaN was not judged.
    targets
        (T,) channels of the model.
    """
    judged = np.isfinite(odd)
    count, strange, shares = int(judged.sum()), int((odd > ODD).sum()), unsure[judged].sum(0).tolist()
    if strange > MOST * count:
        return [
            f"{strange:,} of {count:,} cells are unlike nearly all that the run was calibrated on, by their "
            f"{run.panel.markers[run.source_channel]}, and better not predicted (ood, abstain): check the scale of the "
            "intensities, the pixel size and the staining"
        ]
    often = [
        f"{run.panel.markers[t]} ({n:,} of {count:,})" for t, n in zip(targets, shares, strict=True) if n > MOST * count
    ]
    if not often:
        return []
    return [
        f"most cells are better not predicted (abstain): {', '.join(often)}. Leave them out of what you conclude, or "
        "train with groups like theirs"
    ]
