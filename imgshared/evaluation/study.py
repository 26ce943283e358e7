"""What an evaluation looks at: cells that an imputer never saw, predicted and described, and those it learnt from."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from imgshared.config import EvaluateConfig
from imgshared.data.features import typical_radius
from imgshared.data.split import Split, column
from imgshared.data.store import CellStore
from imgshared.evaluation import coverage
from imgshared.evaluation.checks import Bright
from imgshared.evaluation.classify import Turn
from imgshared.evaluation.cnn import refuse_unknown
from imgshared.evaluation.collect import INPUTS, LINEAR, MEAN, Part, Predict, Progress, collect, join
from imgshared.evaluation.floors import Floors
from imgshared.evaluation.given import images_to_judge
from imgshared.evaluation.guard import Cohort, cohort
from imgshared.evaluation.judgeable import draw, unpaired
from imgshared.evaluation.kept import Keeper, name_of
from imgshared.evaluation.labels import (
    check_values,
    grouped_folds,
    read_factor,
    read_label,
    refuse_broken_folds,
    refuse_untaught,
)
from imgshared.prediction import Run
from imgshared.prediction.trust import Trust, load_trust
from imgshared.prediction.types import Floats, PredictedCells
from imgshared.types import InputError

FLOOR_CELLS = 2000  # training cells for the floors where nothing else asks for more
REALISM = ("real", "predicted", LINEAR, MEAN)  # inputs whose features are measured where no classifier asks for them


class Pictures(NamedTuple):
    """Of some cells, (n, C, Y, X) each, normalised units; `uncertainty` is `Trust.pixels`, NaN without calibration."""

    real: Floats
    predicted: Floats
    uncertainty: Floats


@dataclass(frozen=True)
class Look:
    """One imputer's cells.

    Parameters
    ----------
    run, cohort
        The imputer, and who is judged against whom.
    train, test
        What was kept of them.
    make
        Predicts cells of the judged store, called with (cells, full=..., shared=...).
    trust
        Its calibration, where that is of what is judged.
    """

    run: Run
    cohort: Cohort
    train: Part
    test: Part
    make: Predict
    trust: Trust | None

    def pictures(self, cells: NDArray[np.intp]) -> Pictures:
        """Predict some cells of the judged store."""
        done = self.make(cells, full=False, shared=False)
        half = np.full_like(done.real, np.nan)
        if self.trust is not None:
            half = np.stack([self.trust.pixels(done, c) for c in range(half.shape[1])], 1)
        return Pictures(done.real, done.images["predicted"], half)


@dataclass(frozen=True)
class Study:
    """All that is judged together: the cells of one imputer, or in a nested study of one a fold.

    Parameters
    ----------
    store
        The judged store.
    config
        With `train_on` decided.
    looks
        One an imputer.
    test
        Their held-out cells, one after the other.
    """

    store: CellStore
    config: EvaluateConfig
    looks: Sequence[Look]
    test: Part

    @property
    def nested(self) -> bool:
        """Whether an imputer was trained for each fold."""
        return len(self.looks) > 1

    @property
    def run(self) -> Run:
        """The imputer, in a nested study the first one."""
        return self.looks[0].run

    @property
    def turns(self) -> list[Turn]:
        """Training cells of each imputer with the rows of `test` that it never saw; none: folds among `test`."""
        if self.config.train_on != "train":
            return []
        ends = np.cumsum([0, *(len(look.test.cells) for look in self.looks)])
        return [(look.train, np.arange(*ends[k : k + 2])) for k, look in enumerate(self.looks)]

    @property
    def leaks(self) -> list[str]:
        """See `guard.Cohort`, each said once."""
        return list(dict.fromkeys(leak for look in self.looks for leak in look.cohort.leaks))

    @property
    def cautions(self) -> list[str]:
        """See `guard.Cohort`, each said once."""
        return list(dict.fromkeys(caution for look in self.looks for caution in look.cohort.cautions))

    @property
    def splits(self) -> list[Split]:
        """Who trained, stopped the training and was judged, an imputer."""
        return [look.run.split for look in self.looks]

    @property
    def unpredicted(self) -> int:
        """Held-out cells without what the model predicts from; see `judgeable`."""
        return sum(look.cohort.unpredicted for look in self.looks)

    @property
    def bare(self) -> int:
        """Held-out cells with it, but without a protein."""
        return sum(look.cohort.bare for look in self.looks)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Cells looked at and cells there are, by part, over all imputers."""
        each = (("train", "train"), ("test", "judged"))
        return {
            part: (
                sum(len(getattr(look, part).cells) for look in self.looks),
                sum(len(getattr(look.cohort, name)) for look in self.looks),
            )
            for part, name in each
        }

    def pictures(self, positions: Sequence[int]) -> Pictures:
        """Predict some cells, given by their rows of `test`, each by the imputer that never saw it."""
        starts = np.cumsum([0, *(len(look.test.cells) for look in self.looks)])
        whose = np.searchsorted(starts, positions, side="right") - 1
        each = [(np.flatnonzero(whose == k), look) for k, look in enumerate(self.looks) if (whose == k).any()]
        parts = [look.pictures(self.test.cells[np.asarray(positions)[at]]) for at, look in each]
        order = np.argsort(np.concatenate([at for at, _ in each]))
        return Pictures(*(np.concatenate(part)[order] for part in zip(*parts, strict=True)))


def study(
    run: Run, store: CellStore, config: EvaluateConfig, predict: Predict, say: Progress, keeper: Keeper | None
) -> Study:
    """Look at the held-out cells of one imputer.

    Raises
    ------
    InputError
        See `evaluate.evaluate`.
    """
    check_columns(store.obs, config)
    check_outputs(run, config)
    who = cohort(run, store, config)
    held = store.obs.iloc[who.judged]
    if config.train_on == "auto":  # too few held-out groups cannot be folded
        enough = held[config.fold or config.group].nunique() >= config.folds
        config = dataclasses.replace(config, train_on="test" if enough else "train")
    _check_labels(held, who.source.obs.iloc[who.train], config)
    looked = look(run, store, who, config, predict, say, keeper)
    return Study(store, config, [looked], looked.test)


def joined(store: CellStore, config: EvaluateConfig, looks: Sequence[Look]) -> Study:
    """Judge the held-out cells of several imputers together."""
    return Study(store, config, looks, join([one.test for one in looks]))


def look(
    run: Run,
    store: CellStore,
    who: Cohort,
    config: EvaluateConfig,
    predict: Predict,
    say: Progress,
    keeper: Keeper | None,
    what: str = "",
) -> Look:
    """Predict training cells, for the floors, and those to judge, or take what `keeper` (if any) has kept of them."""
    panel = run.panel
    bound = [c for c in run.method.sources or () if c != panel.chromatin_index]
    on_train = config.train_on == "train"
    limit = config.max_cells
    if not (on_train or config.labels or config.factors):
        limit = min(FLOOR_CELLS, limit)
    train_cells = draw(who.train, limit, config.seed)
    test_cells = draw(who.judged, config.max_cells, config.seed)
    by_features = bool(config.labels) and "features" in config.classifiers
    radius = typical_radius(who.source.masks(train_cells))
    described = (*INPUTS, LINEAR) if by_features else REALISM
    learnt = INPUTS if by_features and on_train else ("real",)
    cnn = bool(config.labels) and "cnn" in config.classifiers
    shown = images_to_judge(predict, run, store, config)
    own = not (config.sharp or config.predictions)  # calibrated were the mean predictions
    trust = load_trust(run.path) if own else None
    make = partial(_predict, partial(shown, run, store), bound)

    def collected() -> Iterator[Part]:
        floors = Floors(len(panel), run.source_channels, seed=config.seed)
        bright = Bright(len(panel), seed=config.seed)
        for images, measured in unpaired(run, who.source, limit, config.seed):
            floors.add(images, measured)
            bright.add(images, measured)
        yield collect(
            partial(_predict, partial(shown, run, who.source), bound), who.source, panel, train_cells,
            fit=floors, bright=bright, features=radius, measure=learnt, crops=cnn and on_train,
            progress=partial(say, f"{what}training cells"),
        )  # fmt: skip
        yield collect(
            make, store, panel, test_cells,
            against=floors, bright=bright, trust=partial(coverage.compare, run, trust) if trust else None,
            features=radius, measure=described, crops=cnn, progress=partial(say, f"{what}held-out cells"),
        )  # fmt: skip

    if keeper is None or cnn:
        train, test = collected()
    else:
        key = name_of(run, [who.source, store], [train_cells, test_cells], config, [described, learnt, radius, limit])
        parts = {f"{key}_train": (who.source, train_cells), f"{key}_test": (store, test_cells)}
        train, test = keeper.get(parts) or keeper.put(parts, collected())
    if test.fidelity.empty:
        raise InputError(
            f"{config.predictions or store.path}: no protein that is predicted is measured in any held-out cell: "
            "nothing to judge. Predict others (markers=...)"
        )
    groups = test.obs[config.group].astype(str).to_numpy()
    for table in (test.fidelity, test.checks, test.trust):
        if len(table):
            table["group"] = groups[table["position"].to_numpy(int)]
    return Look(run, who, train, test, make, trust)


def check_columns(obs: pd.DataFrame, config: EvaluateConfig) -> None:
    """Refuse columns and values that are not there, and columns named twice."""
    for key in ("labels", "factors"):
        twice = [name for name, n in Counter(getattr(config, key)).items() if n > 1]
        if twice:
            raise InputError(f"{key} names {twice[0]!r} twice")
    for name in (*config.labels, config.group, *([config.fold] if config.fold else [])):
        column(obs, name)
    for name in config.factors:
        read_factor(obs, name)
    check_values(obs, config.labels, config.label_values)


def check_outputs(run: Run, config: EvaluateConfig) -> None:
    """Refuse an output that the run has not, and an unknown network, before hours of prediction."""
    if config.predictions is None:
        run.refuse_sharp(config.sharp)
    if config.labels and "cnn" in config.classifiers:
        refuse_unknown(config.cnn)


def _check_labels(test: pd.DataFrame, train: pd.DataFrame, config: EvaluateConfig) -> None:
    """Refuse hopeless labels before hours of prediction."""
    fold = config.fold or config.group
    if config.labels and config.train_on == "test":
        refuse_broken_folds(test, config.group, fold)
    for name in config.labels:
        label = read_label(test, name, config.label_values)
        if config.train_on == "test":
            cells = np.flatnonzero(label.codes >= 0)
            grouped_folds(label, cells, test[fold].astype(str).to_numpy(), fold, config.folds, config.seed)
        else:
            refuse_untaught(label, train)


def _predict(predict: Predict, bound: list[int], cells: NDArray[np.intp], **wishes: Any) -> PredictedCells:
    """Predict; a stain that the method is given, and so knows, is none to judge."""
    done = predict(cells, **wishes)
    measured = done.measured.copy()
    measured[:, bound] = False
    return dataclasses.replace(done, measured=measured)
