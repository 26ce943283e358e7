"""The command line: a thin layer over `imgshared.api`."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imgshared.config import (
    EvaluateConfig,
    Experiment,
    ExportConfig,
    PredictConfig,
    PrepareConfig,
    SimulateConfig,
    SlideConfig,
    dump,
    load,
)
from imgshared.types import InputError

DESCRIPTION = """\
Shared and specific information in multiplexed chromatin/protein microscopy:
predict unmeasured stains, and check the predictions.

  imgshared demo                                     see everything work, on simulated cells
  imgshared prepare manifest.csv cells.zarr          images and a table to a cell store
  imgshared train configs/translator.yaml data=cells.zarr
  imgshared ensemble runs/a runs/b --out runs/both   runs of several seeds as one
  imgshared predict runs/translator cells.zarr       unmeasured stains and latents of cells
  imgshared predict runs/translator slide.ome.tif    unmeasured stains of a whole slide or plate
  imgshared export runs/translator translator.onnx   one file that predicts without imgshared
  imgshared evaluate runs/translator cells.zarr 'labels=[drug]'
"""

KINDS: dict[str, type[Any]] = {
    "simulate": SimulateConfig,
    "prepare": PrepareConfig,
    "train": Experiment,
    "predict": PredictConfig,
    "predict-slide": SlideConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
DENIED = "Choose a place that you may read and write, or change whom it is open to"
MISPLACED = "A file stands where a folder is needed, or a folder where a file is: choose another name, or move it away"
WRONG_PLACE = {  # what to do where the system says this of a path that the user has named
    **dict.fromkeys((errno.EACCES, errno.EPERM), DENIED),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), MISPLACED),
}
GOES_ON = {  # after Ctrl-C
    "train": " The run's last checkpoint is whole: the same command with --resume goes on.",
    "evaluate": " The same command goes on with the folds and classifiers that are done.",
}
SETTING = re.compile(r"[A-Za-z_][^/\\=]*=")  # key=value; a path with = in its first part is written ./a=b


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 for unusable input or a place that cannot be used, 130 where interrupted."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    pairs = zip(["", *words], words, strict=False)
    settings = [word for before, word in pairs if SETTING.match(word) and before not in ("--config", "--out")]
    arguments, rest = parser.parse_known_args([word for word in words if word not in settings])
    arguments.settings = settings
    if rest or (settings and arguments.verb in ("demo", "ensemble")):
        parser.error(f"unrecognised: {' '.join(rest or settings)}")
    warnings.filterwarnings("ignore", module="zarr|anndata|lightning_fabric")
    try:
        arguments.run(arguments)
    except InputError as error:
        print(f"imgshared: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        said = _of_the_place(error)
        if said is None:
            raise
        print(f"imgshared: error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nimgshared: interrupted.{GOES_ON.get(arguments.verb, '')}", file=sys.stderr)
        return 130
    return 0


def _of_the_place(error: OSError) -> str | None:
    """Say what is wrong with a disk or a path, and what to do; None for any other fault."""
    if error.errno in UNWRITABLE:
        where = f" {error.filename}" if error.filename else ""
        return f"cannot write{where}: {error.strerror}"
    if error.errno in WRONG_PLACE and error.filename:
        return f"cannot use {error.filename}: {error.strerror}. {WRONG_PLACE[error.errno]}"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "imgshared", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=f"imgshared {version('imgshared')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND", title="commands")

    demo = _verb(
        verbs,
        "demo",
        _demo,
        "simulate, prepare, train, predict, evaluate: see all of it, down to the report",
        settings=False,
    )
    demo.add_argument("out", nargs="?", type=Path, default=Path("demo"), help="folder to write (default: demo)")

    simulate = _verb(verbs, "simulate", _simulate, "multiplexed images with known shared and specific factors")
    simulate.add_argument("out", type=Path, help="folder to write: images, masks, manifest.csv, cells.csv")

    prepare = _verb(verbs, "prepare", _prepare, "manifest + images (+ label masks) to a cell store")
    prepare.add_argument(
        "manifest",
        type=Path,
        help="CSV or Parquet, a row an image: image, mask, group, labels; or an OME-Zarr plate",
    )
    prepare.add_argument("out", type=Path, help="the store to write, e.g. cells.zarr")
    prepare.add_argument("--overwrite", action="store_true", help="replace an existing store")

    train = _verb(verbs, "train", _train, "train a method; Ctrl-C leaves a checkpoint", config="positional")
    train.add_argument("--out", type=Path, help="run folder (default: runs/<name of the configuration>)")
    train.add_argument("--resume", action="store_true", help="continue exactly where the last checkpoint stands")

    ensemble = _verb(verbs, "ensemble", _ensemble, "runs that differ in their seed alone as one run", settings=False)
    ensemble.add_argument("run_folders", metavar="run", nargs="+", type=Path, help="run folder, two at least")
    ensemble.add_argument("--out", type=Path, required=True, help="run folder to write")

    predict = _verb(verbs, "predict", _predict, "unmeasured stains of cells, slides or plates, in raw intensity units")
    predict.add_argument(
        "run_folder", metavar="run", type=Path, help="run folder, or an .onnx file that `export` wrote"
    )
    predict.add_argument("data", type=Path, help="cell store, slide (OME-TIFF, OME-Zarr) or OME-Zarr plate")
    predict.add_argument(
        "--out", type=Path, help="what to write: a store, a slide.ome.zarr or .ome.tif (default: in <run>/predictions)"
    )
    predict.add_argument("--overwrite", action="store_true", help="replace existing predictions")
    predict.epilog = f"{predict.epilog} For slides and plates: `imgshared config predict-slide`."

    export = _verb(verbs, "export", _export, "a trained translator or regression as one file, ONNX or torch.export")
    export.add_argument("run_folder", metavar="run", type=Path, help="run folder")
    export.add_argument("out", type=Path, help="file to write: name.onnx, or name.pt2 for torch.export")

    evaluate = _verb(verbs, "evaluate", _evaluate, "held-out groups: fidelity, classifiers, latent probes, a report")
    evaluate.add_argument("run_folder", metavar="run", type=Path, help="run folder")
    evaluate.add_argument("store", type=Path, help="cell store")
    evaluate.add_argument(
        "--out", type=Path, help="folder to write (default: <run>/evaluation/<store>, with --refit <store>_refit)"
    )
    evaluate.add_argument(
        "--allow-seen-groups", action="store_true", help="judge groups that trained the model, too: marked as leaking"
    )

    evaluate.add_argument(
        "--refit", action="store_true", help="nested: train again for each fold of groups, and judge every group"
    )
    evaluate.add_argument("--fold", type=int, help="with --refit: train this fold alone, from 1 on (one a process)")

    show = verbs.add_parser("config", help="print every setting of a command as YAML, checked and resolved")
    show.set_defaults(run=_show)
    show.add_argument("kind", choices=list(KINDS), help="the command whose settings to print")
    show.add_argument("--config", type=Path, help="a YAML file to check and resolve")
    return parser


def _verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    *,
    settings: bool = True,
    config: str = "option",
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(run=run)
    if settings:
        parser.epilog = (
            f"Settings are key=value, e.g. a.b=2e-4: `imgshared config {name}` prints every key with its default."
        )
        if config == "option":
            parser.add_argument("--config", type=Path, help="a YAML file of settings")
        else:
            parser.add_argument("config", type=Path, help="a YAML file, e.g. configs/translator.yaml")
    return parser


def _console() -> Any:
    from rich.console import Console

    return Console(quiet=not _first())


def _first() -> bool:
    """Whether this is the only process, or under torchrun the first, which alone speaks."""
    return os.environ.get("RANK", "0") == "0"


def _simulate(a: argparse.Namespace) -> None:
    from imgshared import api

    print(api.simulate(a.out, console=_console(), config=load(SimulateConfig, a.config, a.settings)))


def _prepare(a: argparse.Namespace) -> None:
    from imgshared import api

    config = load(PrepareConfig, a.config, a.settings)
    print(api.prepare(a.manifest, a.out, overwrite=a.overwrite, console=_console(), config=config))


def _train(a: argparse.Namespace) -> None:
    from imgshared import api

    api.train(a.config, *a.settings, out=a.out, resume=a.resume, console=_console())


def _ensemble(a: argparse.Namespace) -> None:
    from imgshared import api

    print(api.ensemble(a.run_folders, a.out, console=_console()).path)


def _predict(a: argparse.Namespace) -> None:
    from imgshared import api
    from imgshared.data.windows import is_slide

    config = load(SlideConfig if is_slide(a.data) else PredictConfig, a.config, a.settings)
    out = api.predict(a.run_folder, a.data, a.out, overwrite=a.overwrite, console=_console(), config=config)
    if _first():
        print(out)


def _export(a: argparse.Namespace) -> None:
    from imgshared import api

    print(api.export(a.run_folder, a.out, console=_console(), config=load(ExportConfig, a.config, a.settings)))


def _evaluate(a: argparse.Namespace) -> None:
    from imgshared import api

    flags = [f"{name}=true" for name in ("allow_seen_groups", "refit") if getattr(a, name)]
    config = load(EvaluateConfig, a.config, [*a.settings, *flags])
    if a.fold is not None:
        if not config.refit:
            raise InputError("--fold is one of a nested study's: it needs --refit")
        api.refit(a.run_folder, a.store, a.out, fold=a.fold, console=_console(), config=config)
        print(f"Fold {a.fold} is trained. Where all are, the same command without --fold judges them together.")
        return
    if config.refit and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        api.refit(a.run_folder, a.store, a.out, console=_console(), config=config)
    if _first():
        print(api.evaluate(a.run_folder, a.store, a.out, console=_console(), config=config).report)


def _demo(a: argparse.Namespace) -> None:
    from imgshared.demo import demo

    demo(a.out, _console())


def _show(a: argparse.Namespace) -> None:
    settings = a.settings
    if a.kind == "train" and a.config is None and not any(s.startswith("data=") for s in settings):
        settings = ["data=cells.zarr", *settings]  # the only key without a default
    print(dump(load(KINDS[a.kind], a.config, settings)), end="")


if __name__ == "__main__":
    sys.exit(main())
