"""imc_spleen: leave one region out, DNA1 to each protein, beside both floors.

    python scripts/study_imc_spleen.py DATA OUT [--regions ROI002 ...]

DATA is the folder that holds imc_spleen/. For each region: it is reported on, the next one stops the training, the
other two train.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from common import ROOT, markdown, metrics, record
from rich.console import Console

import imgshared
from imgshared.config import Experiment, PrepareConfig, load

REGIONS = ("ROI002", "ROI004", "ROI008", "ROI010")


def main() -> None:
    """Prepare once, train and evaluate a region at a time, summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--regions", nargs="+", default=list(REGIONS), choices=REGIONS)
    parser.add_argument("--record", type=Path, default=None, help="JSON to write (default: OUT/imc_spleen.json)")
    a = parser.parse_args()
    store = prepared(a.data.resolve() / "imc_spleen", a.out)
    tables = []
    for region in a.regions:
        report = one(store, a.out / region, region)
        tables.append(metrics(report)["fidelity"].assign(region=region))
    table = pd.concat(tables)
    record(a.record or a.out / "imc_spleen.json", {"rows": table.to_dict("records")})
    print(
        "\nmean over left-out regions of the Pearson r of pixels a cell, and of the Spearman r of cells' intensities\n"
    )
    print(markdown(summary(table)))


def prepared(data: Path, out: Path, *overrides: str) -> Path:
    """Write a manifest of the four regions and prepare the store once."""
    store, manifest = out / "cells.zarr", out / "manifest.csv"
    if not store.exists():
        out.mkdir(parents=True, exist_ok=True)
        rows = [{"image": data / f"{r}.ome.tif", "mask": data / f"{r}_cells.tif", "group": r} for r in REGIONS]
        pd.DataFrame(rows).to_csv(manifest, index=False)
        settings = [f"cells={data / 'cells.csv'}", *overrides]
        config = load(PrepareConfig, ROOT / "configs" / "prepare_imc_spleen.yaml", settings)
        print(imgshared.prepare(manifest, store, console=Console(), config=config))
    return store


def one(store: Path, run: Path, region: str) -> Path:
    """Train and evaluate with one region left out, or return the report that is there."""
    report = run / "evaluation" / "cells"
    if (report / "metrics.json").exists():
        return report
    val = REGIONS[(REGIONS.index(region) + 1) % len(REGIONS)]
    overrides = [f"data={store}", f"split.test=[{region}]", f"split.val=[{val}]"]
    experiment = load(Experiment, ROOT / "configs" / "apollo_imc.yaml", overrides)
    trained = imgshared.train(experiment, out=run, resume=run.exists(), console=Console())
    imgshared.evaluate(trained, store, console=Console(), max_cells=3000)
    return report


def summary(table: pd.DataFrame) -> list[dict[str, object]]:
    """Return a row a marker: the model and both floors."""
    mean = table.pivot_table(index=["marker", "prediction"], columns="score", values="value", sort=False)
    rows = []
    for marker in dict.fromkeys(table["marker"]):
        pearson, spearman = mean.loc[marker]["pearson"], mean.loc[marker]["intensity_spearman"]
        rows.append(
            {
                "marker": marker,
                "r predicted": pearson["predicted"],
                "r linear": pearson["linear"],
                "r marker mean": pearson["marker_mean"],
                "r full reconstruction": pearson["full"],
                "intensity predicted": spearman["predicted"],
                "intensity linear": spearman["linear"],
            }
        )
    return rows


if __name__ == "__main__":
    main()
