"""The nested study on real cells: every well and region judged by a model that never saw it.

    python scripts/study_nested.py DATA OUT [--parts bbbc013 imc_spleen]

DATA holds bbbc013/ and imc_spleen/. translator by its mean. bbbc013: 4 folds of wells, dose; imc_spleen: its 4 regions
one by one, white pulp against red pulp, at most 1,000 cells of each part. Reports are in OUT/<part>/run/evaluation;
finished folds are not trained again. An error where predicted FKHR tells the dose as well as the real stain: DNA cannot
know it, so that something would leak.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import study_bbbc013
import study_imc_spleen
from common import MEAN, ROOT, markdown, record
from rich.console import Console

import imgshared
from imgshared.config import Experiment, load
from imgshared.evaluation.verdict import INFERIOR, LOST

PARTS: dict[str, dict[str, Any]] = {
    "bbbc013": {
        "settings": ("split.test=0.25", "split.val=0.15", "method.epochs=8"),
        "labels": {"labels": ["dose"], "label_values": ["low", "high"], "folds": 4},
    },
    "imc_spleen": {
        "settings": ("split.test=0.25", "split.val=0.25", "method.epochs=3", "normalise.transform=arcsinh",
                     "normalise.cofactor=1", "normalise.low=0"),
        "labels": {"labels": ["region"], "label_values": ["white_pulp", "red_pulp"], "folds": 4, "max_cells": 1000},
    },
}  # fmt: skip


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--record", type=Path, default=None, help="JSON to write (default: OUT/nested.json)")
    a = parser.parse_args()
    result = {part: one(a, part) for part in a.parts}
    record(a.record or a.out / "nested.json", result)
    for part, found in result.items():
        print(f"\n{part}\n\n{markdown(found['labels'])}\n\n" + "\n".join(found["words"]))
    told = [row["verdict"] for row in result.get("bbbc013", {}).get("labels", [])]
    if any(verdict not in (LOST, INFERIOR) for verdict in told):
        raise SystemExit(f"bbbc013: predicted FKHR must not carry the dose, but its verdict is {', '.join(told)}")


def one(a: argparse.Namespace, part: str) -> dict[str, Any]:
    """Train once for the configuration, then each fold again, and judge."""
    data, out = a.data.resolve() / part, a.out / part
    if part == "bbbc013":
        store = study_bbbc013.prepared(data, out)
    else:
        store = study_imc_spleen.prepared(data, out, "crop_px=64")
    wish = PARTS[part]
    overrides = [f"data={store}", *wish["settings"], *MEAN]
    experiment = load(Experiment, ROOT / "configs" / "translator.yaml", overrides)
    run = imgshared.train(experiment, out=out / "run", resume=(out / "run").exists(), console=Console())
    found = imgshared.evaluate(run, store, console=Console(), refit=True, **wish["labels"])
    shutil.copy(found.report, a.out / f"{part}.html")
    kept = ("label", "marker", "backend", "verdict", "over_chromatin", "real", "predicted", "chromatin", "gap")
    labels = [{k: v for k, v in row.items() if k in kept} for row in found.labels.to_dict("records")]
    more = {
        name: found.metrics[name] for name in ("controls", "imputability", "coverage", "leaks", "cautions", "splits")
    }
    settings = {"training": [*wish["settings"], *MEAN], "evaluation": wish["labels"]}
    return {"settings": settings, "labels": labels, "words": list(found.labels["words"]), **more}


if __name__ == "__main__":
    main()
