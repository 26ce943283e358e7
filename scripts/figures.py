"""The figures of the studies, from what `reproduce.sh` left in OUT.

    python scripts/figures.py OUT

OUT/figures holds: `simulated.png`, `bbbc013.png`, `imc_spleen.png` (DNA | real | predicted | difference of the held-out
cell with the median Pearson r of each stain, one contrast for real and predicted) and `probes.png` (what the latents
hold, simulated cells).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

import imgshared
from imgshared.data.scale import scale_bar
from imgshared.evaluation.figures import BLUE, INK, ORANGE, SOFT
from imgshared.prediction import predict_cells

FIRST = {"simulated": "independent_0/apollo", "bbbc013": "seed_0", "imc_spleen": "ROI010"}


def main() -> None:
    """Draw every figure whose runs are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for study, run in FIRST.items():
        folder = out / study / run
        if (folder / "evaluation").exists():
            store = folder.parent / "cells.zarr"
            median_cells(folder, store).savefig(figures / f"{study}.png", dpi=110)
            print(figures / f"{study}.png")
    if (out / "results" / "simulated.json").exists():
        probes(out / "simulated").savefig(figures / "probes.png", dpi=110)
        print(figures / "probes.png")


def median_cells(run_folder: Path, store_folder: Path, columns: int = 2) -> Figure:
    """Show each stain's median held-out cell."""
    run, store = imgshared.load_run(run_folder), imgshared.open_store(store_folder)
    table = pd.read_csv(run_folder / "evaluation" / store_folder.stem / "tables" / "cells.csv").dropna(
        subset=["pearson"]
    )
    rows = {str(cell): row for row, cell in enumerate(store.obs.index)}
    markers = [m for m in run.panel.proteins if (table["marker"] == m).any()]
    columns = min(columns, len(markers))
    tall = -(-len(markers) // columns)
    side = 1.25
    figure = Figure((columns * (4 * side + 0.5), tall * (side + 0.42)), facecolor="white", layout="constrained")
    for at, block in zip(np.ndindex(tall, columns), figure.subfigures(tall, columns, squeeze=False).flat, strict=True):
        number = at[0] * columns + at[1]
        if number >= len(markers):
            continue
        marker = markers[number]
        part = table[table["marker"] == marker].sort_values("pearson", kind="stable")
        cell = part.iloc[len(part) // 2]
        done = predict_cells(run, store, np.array([rows[str(cell["cell_id"])]]), full=False, shared=False)
        c = run.panel.index(marker)
        real, predicted = done.real[0, c], done.images["predicted"][0, c]
        low, high = np.percentile(real, (0.5, 99.5))
        span = max(float(high - low), 1e-3)
        axes = block.subplots(1, 4)
        dna = done.real[0, run.panel.chromatin_index]
        show(axes[0], dna, run.panel.chromatin, *np.percentile(dna, (0.5, 99.5)))
        show(axes[1], real, f"{marker}, real", low, high)
        show(axes[2], predicted, f"predicted, r {cell['pearson']:.2f}", low, high)
        show(axes[3], predicted - real, "difference", -span, span, "PuOr")
        draw_scale_bar(axes[0], store.crop_px, store.pixel_size_um)
    return figure


def show(ax: Axes, image: np.ndarray, title: str, low: float, high: float, colours: str = "gray") -> None:
    """Draw one crop."""
    ax.imshow(image, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    ax.set_title(title, fontsize=8.5, color=INK, pad=3)
    ax.set_axis_off()


def draw_scale_bar(ax: Axes, crop_px: int, pixel_size_um: float | None) -> None:
    """Draw the scale bar into a crop."""
    length, says = scale_bar(crop_px, pixel_size_um)
    left, bottom = 0.05 * crop_px - 0.5, 0.93 * crop_px - 0.5
    edge = [withStroke(linewidth=2.5, foreground="black")]  # readable on bright crops
    right = left + length
    ax.plot([left, right], [bottom, bottom], color="white", lw=2, solid_capstyle="butt", path_effects=edge)
    above = bottom - 0.03 * crop_px
    ax.text(left, above, says, color="white", fontsize=6.5, va="bottom", path_effects=edge)


def probes(folder: Path) -> Figure:
    """Show R2 of every factor from z_s of DNA and from its own protein's latents, a dot a seed."""
    rows = []
    for path in sorted(folder.glob("independent_*/apollo/evaluation/cells/metrics.json")):
        rows += [r for r in json.loads(path.read_text())["probes"] if r["score"] == "r2"]
    table = pd.DataFrame(rows)
    owner = (
        table[table["latent"].str.startswith("z_m")]
        .groupby(["target", "latent"])["value"]
        .mean()
        .groupby(level=0)
        .idxmax()
    )
    targets = list(dict.fromkeys(table["target"]))
    figure = Figure((6.4, 0.34 * len(targets) + 0.9), facecolor="white", layout="constrained")
    ax = figure.subplots()
    for y, target in enumerate(targets):
        for latent, colour, shift in (("z_s [DNA]", BLUE, -0.12), (owner[target][1], ORANGE, 0.12)):
            values = table[(table["target"] == target) & (table["latent"] == latent)]["value"].clip(lower=-0.1)
            ax.plot(values, np.full(len(values), y + shift), "o", ms=5, color=colour, alpha=0.8)
    ax.axvline(0, color=SOFT, lw=0.8)
    ax.set_yticks(range(len(targets)), [f"{t}  ({owner[t][1]})" for t in targets], fontsize=8.5)
    ax.set_ylim(len(targets) - 0.5, -0.5)
    ax.set_xlabel("R2 on held-out donors", fontsize=9)
    ax.spines[["top", "right", "left"]].set_visible(False)
    for label, colour in (("z_s, encoded from DNA alone", BLUE), ("z_m of the stain that tells it best", ORANGE)):
        ax.plot([], [], "o", ms=5, color=colour, label=label)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    return figure


if __name__ == "__main__":
    main()
