"""The verbs of the package as functions: what the command line does, in a script or a notebook."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from imgshared.config import (
    EvaluateConfig,
    Experiment,
    ExportConfig,
    PredictConfig,
    PrepareConfig,
    SimulateConfig,
    SlideConfig,
    load,
    validate,
)
from imgshared.data.ngff import is_plate
from imgshared.data.prepare import PrepareSummary
from imgshared.data.prepare import prepare as _prepare
from imgshared.data.readers import stem
from imgshared.data.segment import SegmentSettings
from imgshared.data.simulate import simulate as _simulate
from imgshared.data.store import CellStore
from imgshared.data.windows import is_slide
from imgshared.evaluation.calibrate import calibrate
from imgshared.evaluation.evaluate import Evaluation
from imgshared.evaluation.evaluate import evaluate as _evaluate
from imgshared.evaluation.imputability import assess, warnings_of
from imgshared.evaluation.refit import await_folds, fit_folds
from imgshared.prediction import Run, predict_image
from imgshared.prediction import load_run as _load_run
from imgshared.prediction import predict as _predict
from imgshared.prediction.doubts import many_sources
from imgshared.prediction.ensemble import make_ensemble
from imgshared.slides import predict_plate, predict_slide
from imgshared.slides.job import clipped
from imgshared.training.devices import alone, place_among_processes
from imgshared.training.loop import train as _train
from imgshared.types import InputError

__all__ = [
    "ensemble",
    "evaluate",
    "export",
    "load_run",
    "open_store",
    "predict",
    "predict_image",
    "prepare",
    "refit",
    "simulate",
    "train",
]

PathLike = str | Path


def open_store(path: PathLike) -> CellStore:
    """Open a cell store (or a store of predictions) for reading."""
    return CellStore(path)


def load_run(path: PathLike, *, checkpoint: str = "best") -> Run:
    """Open a run folder, or a file that `export` wrote (``.onnx``), for prediction; see `prediction.load_run`."""
    if Path(path).suffix == ".onnx":
        from imgshared.prediction.onnx import load_onnx

        return load_onnx(Path(path))
    return _load_run(path, checkpoint=checkpoint)


def simulate(out: PathLike, *, console: Console | None = None, **settings: Any) -> Path:
    """Simulate images with known shared and specific factors; return their folder.

    Settings are those of `SimulateConfig`. Here and below: they come as keywords or as one object, ``config=...``, and
    a progress bar is drawn on the `console`, where one is given.
    """
    config = _settings(SimulateConfig, settings)
    with _bar(console, "simulate") as moved:
        return _simulate(Path(out), **_shallow(config), progress=lambda done, total: moved("simulate", done, total))


def prepare(
    manifest: PathLike, out: PathLike, *, overwrite: bool = False, console: Console | None = None, **settings: Any
) -> PrepareSummary:
    """Turn a manifest and its images into a cell store; settings are those of `PrepareConfig`."""
    config = _settings(PrepareConfig, settings)
    arguments = _shallow(config) | {"segment": SegmentSettings(**_shallow(config.segment))}
    with _bar(console, "prepare") as moved:
        return _prepare(
            Path(manifest), Path(out), **arguments, overwrite=overwrite,
            progress=lambda done, total, image: moved(f"prepare {image}", done, total),
        )  # fmt: skip


def train(
    config: PathLike | Experiment,
    *overrides: str,
    out: PathLike | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> Run:
    """Train what a YAML file (with ``"key=value"`` overrides) or an `Experiment` describes, and open the run.

    Without `out` the run goes to ``runs/<name of the configuration>``. With `resume` a run that was begun there goes on
    where its last checkpoint stands.

    Raises
    ------
    InputError
        See `imgshared.training.loop.train`; also for overrides beside an `Experiment`, which is complete.
    """
    if isinstance(config, Experiment) and overrides:
        raise InputError(f"overrides change a YAML file, not an Experiment: {', '.join(overrides)}")
    experiment = config if isinstance(config, Experiment) else load(Experiment, Path(config), overrides)
    if out is None:
        name = experiment.method.name if isinstance(config, Experiment) else Path(config).stem
        out = Path("runs") / name
    console = console or Console()
    _train(experiment, Path(out), resume=resume, console=console)
    return _with_trust(load_run(out), console)


def ensemble(runs: Sequence[Run | PathLike], out: PathLike, *, console: Console | None = None) -> Run:
    """Make one run of several that differ in their seed alone, calibrate it, and open it.

    It predicts their mean, and what they disagree on is its scale, which its intervals follow. It has no latents and is
    neither exported nor trained again by `refit`.

    Raises
    ------
    InputError
        See `prediction.ensemble.make_ensemble`; also where the store that trained the runs is not where it was.
    """
    members = [_opened_run(run) for run in runs]
    for run in members:
        run.training_store("its validation groups calibrate an ensemble")
    console = console or Console()
    return load_run(make_ensemble(members, Path(out), lambda folder: _with_trust(load_run(folder), console)))


def _with_trust(run: Run, console: Console) -> Run:
    """Calibrate a run on its validation groups, and say what these speak against."""
    store = CellStore(run.experiment.data)
    with _bar(console if run.fabric.is_global_zero else None) as moved:
        calibrate(run, store, partial(moved, "calibrate"))
        assessed = assess(run, store, partial(moved, "imputability"))
    if assessed:
        for warning in warnings_of(run, run.panel.markers):
            console.print(f"imputability, on the validation groups: {warning}", highlight=False, soft_wrap=True)
    return run


def predict(
    run: Run | PathLike,
    data: CellStore | PathLike,
    out: PathLike | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> Path:
    """Predict the unmeasured stains of a cell store, a slide (TIFF, OME-Zarr) or an OME-Zarr plate.

    A store's go into a new store (cells that do not show the sources are left out, and said), settings are those of
    `PredictConfig`; a slide's into an OME-Zarr image, or where `out` ends in .ome.tif an OME-TIFF, settings are those
    of `SlideConfig`. Without `out` they go to ``<run>/predictions/<name>``. Warns of markers that the run's validation
    groups speak against (`imputability.json` in its folder), of more sources than the model was ever shown, of
    intensities of another scale or beyond a slide's dtype, and where most cells are better not predicted.
    """
    run = _opened_run(run)
    slide = not isinstance(data, CellStore) and is_slide(Path(data))
    config = _settings(SlideConfig if slide else PredictConfig, settings)

    warn = _warner(console)
    for text in _doubts(run, config) + (clipped(run, config) if slide else []):
        warn(text)
    if not isinstance(data, CellStore) and slide:
        path = Path(data)
        out = Path(out) if out is not None else run.results / "predictions" / f"{stem(path.name)}.ome.zarr"
        with _bar(console if run.fabric.is_global_zero else None, "predict") as moved:
            if is_plate(path):
                return predict_plate(run, path, out, config, overwrite=overwrite, progress=moved)
            return predict_slide(run, path, out, config, overwrite=overwrite, progress=moved, warn=warn)
    store = data if isinstance(data, CellStore) else CellStore(data)
    out = Path(out) if out is not None else run.results / "predictions" / f"{store.path.stem}.zarr"
    if out.name.lower().endswith((".tif", ".tiff")):
        raise InputError(
            f"{out}: what is predicted of a cell store is a store, too: name it .zarr; ome_tiff=true writes its images "
            "as OME-TIFF beside it"
        )
    with _bar(console, "predict") as moved:
        return _predict(
            run, store, out, config, overwrite=overwrite, warn=warn,
            progress=lambda done, total: moved("predict", done, total),
        )  # fmt: skip


def export(run: Run | PathLike, out: PathLike, *, console: Console | None = None, **settings: Any) -> Path:
    """Write a run's prediction as ONNX (``.onnx``) or a PyTorch program (``.pt2``); settings are `ExportConfig`'s.

    Warns as `predict` does of markers and of more sources than the model was ever shown: the file cannot.
    """
    from imgshared.prediction.export import export as _export  # torch.export takes a while to import

    run, config, warn = _opened_run(run), _settings(ExportConfig, settings), _warner(console)
    path = _export(run, Path(out), config)
    for text in _doubts(run, config):
        warn(text)
    return path


def _doubts(run: Run, config: PredictConfig | SlideConfig | ExportConfig) -> list[str]:
    asked = [run.panel.markers[c] for c in run.panel.indices(config.markers or run.panel.proteins)]
    return [*warnings_of(run, asked), *many_sources(run, config.sources)]


def _warner(console: Console | None) -> Callable[[str], None]:
    """Return what tells a user of a doubt: on the console, or as a warning of what was called."""

    def warn(text: str) -> None:
        if console is None:
            warnings.warn(text, stacklevel=3)
        else:
            console.print(f"imgshared: warning: {text}", style="yellow", highlight=False, soft_wrap=True)

    return warn


@alone()
def evaluate(
    run: Run | PathLike,
    store: CellStore | PathLike,
    out: PathLike | None = None,
    *,
    console: Console | None = None,
    **settings: Any,
) -> Evaluation:
    """Judge a run on the held-out groups of a store and write the report; settings are those of `EvaluateConfig`.

    Without `out` it goes to ``<run>/evaluation/<name of the store>``; an earlier evaluation there is replaced. With
    ``refit=True`` the run's configuration is first trained again for each fold of groups (see `refit`), by default in
    ``<run>/evaluation/<name of the store>_refit``. Under torchrun call `refit` in all processes first, this in one.
    """
    run, store = _opened(run, store)
    config = _settings(EvaluateConfig, settings)
    out = _evaluation_folder(run, store, out, config)
    if not config.refit:
        with _bar(console, "evaluate") as moved:
            return _evaluate(run, store, out, config, progress=moved)
    with _bar(console, "nested study") as whole:
        _refit(run, store, out, config, None, console, whole)
        whole("judgement", config.folds, config.folds + 1)
        with _bar(console, "evaluate") as moved:
            return _evaluate(run, store, out, config, progress=moved)


@alone()
def refit(
    run: Run | PathLike,
    store: CellStore | PathLike,
    out: PathLike | None = None,
    *,
    fold: int | None = None,
    console: Console | None = None,
    **settings: Any,
) -> None:
    """Train the models of a nested study that are not there yet, for ``evaluate(..., refit=True)`` to judge.

    `fold` (from 1 on) trains that one alone, so that folds can run in processes of their own; an interrupted one goes
    on where it stood. Under torchrun each process trains its share of the folds, on its own device, and waits for the
    others.
    """
    run, store = _opened(run, store)
    config = _settings(EvaluateConfig, settings)
    if fold is not None and place_among_processes()[1] > 1:
        raise InputError("--fold trains one fold in one process: under torchrun leave it out, folds are shared out")
    folder, (rank, world) = _evaluation_folder(run, store, out, config), place_among_processes()
    own = range(rank + 1, config.folds + 1, world)
    with _bar(console, "nested study") as whole:
        _refit(run, store, folder, config, own if fold is None else [fold], console, whole)
    if fold is None:
        await_folds(folder, config.folds)


def _refit(
    run: Run,
    store: CellStore,
    out: Path,
    config: EvaluateConfig,
    only: Collection[int] | None,
    console: Console | None,
    moved: Callable[[str, int, int], None],
) -> None:
    shown = console or Console(quiet=True)

    def fit(experiment: Experiment, folder: Path, resume: bool) -> None:
        shown.rule(f"{folder.name.replace('_', ' ')}, without {experiment.split.by} {_names(experiment.split.test)}")
        _train(experiment, folder, resume=resume, console=shown)
        calibrate(load_run(folder), store)

    fit_folds(run, store, out, config, fit, only, moved)


def _evaluation_folder(run: Run, store: CellStore, out: PathLike | None, config: EvaluateConfig) -> Path:
    name = f"{store.path.stem}_refit" if config.refit else store.path.stem
    return Path(out) if out is not None else run.results / "evaluation" / name


def _names(wish: float | tuple[str, ...]) -> str:
    return ", ".join(wish) if isinstance(wish, tuple) else f"{wish:g}"


def _opened(run: Run | PathLike, store: CellStore | PathLike) -> tuple[Run, CellStore]:
    return _opened_run(run), store if isinstance(store, CellStore) else CellStore(store)


def _opened_run(run: Run | PathLike) -> Run:
    return run if isinstance(run, Run) else load_run(run)


def _settings(kind: type[Any], settings: dict[str, Any]) -> Any:
    if set(settings) == {"config"} and isinstance(settings["config"], kind):
        return settings["config"]
    return validate(kind, settings, f"{kind.__name__}")


def _shallow(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


class _bar:
    """A progress bar on a console, or none: a callable ``(what, done, total)`` for the time of a `with` block.

    It shows from the beginning on under the name `what`, and without a name once there is something to show.
    """

    def __init__(self, console: Console | None, what: str = "") -> None:
        self._console, self._what = console, what

    def __enter__(self) -> Callable[[str, int, int], None]:
        if self._console is None:
            return lambda what, done, total: None
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self._console,
        )  # fmt: skip
        task = self._progress.add_task(self._what, total=None)
        if self._what:
            self._progress.start()

        def moved(what: str, done: int, total: int) -> None:
            self._progress.update(task, description=what, completed=done, total=total)
            self._progress.start()

        return moved

    def __exit__(self, *_: object) -> None:
        if self._console is not None and self._progress.live.is_started:
            self._progress.stop()
