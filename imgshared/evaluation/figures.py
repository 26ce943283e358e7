"""The report's figures: matplotlib to PNG as base64, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from imgshared.data.scale import scale_bar
from imgshared.evaluation.checks import Maps

INK, SOFT, RULE = "#1d2433", "#6b7280", "#d8dce3"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"  # Okabe-Ito
COLOURS = {
    "real": INK,
    "full": GREEN,
    "shared": PINK,
    "predicted": BLUE,
    "chromatin": YELLOW,
    "chromatin + predicted": SKY,
    "linear": ORANGE,
    "marker_mean": "#9aa1ad",
}
SAID = {
    "real": "real stain",
    "full": "full reconstruction",
    "shared": "shared reconstruction",
    "predicted": "predicted",
    "chromatin": "chromatin alone",
    "chromatin + predicted": "chromatin and predicted",
    "real → predicted": "learnt from real, tested on predicted",
    "predicted → real": "learnt from predicted, tested on real",
    "real → swapped within label": "learnt from real, tested on a prediction of the same class",
    "real → swapped": "learnt from real, tested on any cell's prediction",
    "chromatin + swapped within label": "chromatin and a prediction of the same class",
    "chromatin + swapped": "chromatin and any cell's prediction",
    "marker mean": "control: the mean picture of the stain",
    "linear": "floor: linear on blurred sources",
    "marker_mean": "floor: mean picture of the marker",
}
LINES = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, INK, SOFT)
STYLE: dict[str, Any] = {"fontsize": 9, "color": INK}


@dataclass(frozen=True)
class Example:
    """One cell to show: (Y, X) images in normalised units and a caption, e.g. ``"median, r 0.81"``.

    `uncertainty` holds half widths of intervals, NaN where there are none.
    """

    source: NDArray[np.float32]
    real: NDArray[np.float32]
    predicted: NDArray[np.float32]
    uncertainty: NDArray[np.float32]
    caption: str


def gallery(marker: str, source: str, examples: Sequence[Example], pixel_size_um: float | None) -> str:
    """Show cells as rows: chromatin | real | predicted | difference | uncertainty where known, with a scale bar.

    Real and predicted share one contrast for the marker, the 0.5 to 99.5 percentile of the real stains shown; the
    difference spans the same width about zero, the uncertainty from zero to its greatest value.
    """
    low, high = np.percentile([e.real for e in examples], (0.5, 99.5))
    width = max(float(high - low), 1e-3)
    dark, light = np.percentile([e.source for e in examples], (0.5, 99.5))
    unsure = max((float(e.uncertainty.max()) for e in examples if np.isfinite(e.uncertainty).all()), default=None)
    titles = [source, "real", "predicted", "predicted − real", *(["uncertainty"] if unsure is not None else [])]
    # Sizes in inches, so that every crop is a square whatever the number of rows.
    side, gap, left, top = 1.3, 0.05, 0.95, 0.34
    total = (left + len(titles) * (side + gap), top + len(examples) * (side + gap) + 0.34)
    figure = Figure(total, facecolor="white")
    for row, example in enumerate(examples):
        pictures = (
            (example.source, "gray", dark, light),
            (example.real, "gray", low, high),
            (example.predicted, "gray", low, high),
            (example.predicted - example.real, "PuOr", -width, width),
            (example.uncertainty, "viridis", 0, unsure),
        )
        bottom = total[1] - top - (row + 1) * (side + gap)
        for column, (title, (image, colours, vmin, vmax)) in enumerate(zip(titles, pictures, strict=False)):
            place = (left + column * (side + gap), bottom, side, side)
            ax = figure.add_axes(tuple(v / total[i % 2] for i, v in enumerate(place)))  # type: ignore[arg-type]
            ax.imshow(image, cmap=colours, vmin=vmin, vmax=vmax, interpolation="nearest")
            ax.set_axis_off()
            if row == 0:
                ax.set_title(title, pad=5, fontsize=10.5, color=INK)
        middle = (bottom + side / 2) / total[1]
        figure.text(0.06 / total[0], middle, example.caption, va="center", fontsize=10, color=SOFT, linespacing=1.4)
    _scale_bar(figure, total, (left, side, gap), examples[0].real.shape[1], pixel_size_um)
    span = f"contrast {low:.2f} to {high:.2f}, difference ±{width:.2f}"
    span += f", uncertainty 0 to {unsure:.2f}" if unsure is not None else ""
    figure.text(1 - gap / total[0], 0.1 / total[1], span, ha="right", fontsize=8.5, color=SOFT)
    figure.text(0.06 / total[0], 1 - 0.2 / total[1], marker, fontsize=11, color=INK, fontweight="bold")
    return encode(figure, dpi=150)


def contradictions(maps: Mapping[str, Maps], most: int = 12) -> str:
    """Show where predictions contradict real stains: a row a marker, means over cells about the nucleus's centre.

    Mean real and predicted picture at one contrast, their difference, and the share of cells in which a pixel belongs
    to a real object that the prediction has not (missed), and the reverse (invented), both from 0 to 1/2.
    """
    chosen = list(maps.items())[:most]
    titles = ("mean real", "mean predicted", "predicted − real", "missed", "invented")
    figure = Figure((1.3 * len(titles) + 1.1, 1.36 * len(chosen) + 0.35), facecolor="white", layout="constrained")
    grid = figure.subplots(len(chosen), len(titles), squeeze=False)
    for axes, (marker, m) in zip(grid, chosen, strict=True):
        real, predicted = m.real / m.cells, m.predicted / m.cells
        low, high = float(real.min()), max(float(real.max()), float(real.min()) + 1e-3)
        gap = predicted - real
        width = (high - low) / 2
        pictures = (
            (real, "gray", low, high), (predicted, "gray", low, high), (gap, "PuOr", -width, width),
            (m.missed / m.cells, "viridis", 0, 0.5), (m.invented / m.cells, "viridis", 0, 0.5),
        )  # fmt: skip
        for ax, (image, colours, vmin, vmax) in zip(axes, pictures, strict=True):
            ax.imshow(image, cmap=colours, vmin=vmin, vmax=vmax, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_frame_on(False)
        axes[0].set_ylabel(marker, **STYLE)
    for ax, title in zip(grid[0], titles, strict=True):
        ax.set_title(title, pad=5, fontsize=9.5, color=INK)
    return encode(figure)


def risk(table: pd.DataFrame) -> str:
    """Draw the error of the surest cells over the share kept, a line a marker, relative to that of all cells."""
    figure = Figure((5.6, 3.0), facecolor="white", layout="constrained")
    ax = figure.subplots()
    for k, (marker, part) in enumerate(table.groupby("marker", sort=False)):
        whole = float(part.sort_values("kept")["error"].iloc[-1])
        ax.plot(part["kept"], part["error"] / whole, "o-", ms=3, lw=1.4, color=LINES[k % len(LINES)], label=marker)
    ax.axhline(1, color=SOFT, lw=0.8, ls=(0, (4, 3)))
    ax.set_xlim(1.03, 0.07)
    ax.set_xlabel("share of cells kept, the surest", **STYLE)
    ax.set_ylabel("error, relative to all cells", **STYLE)
    ax.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=2)
    _clean(ax, "y")
    return encode(figure)


def reliability(table: pd.DataFrame) -> str:
    """Draw the share within intervals over the level that they promise: pixels and cells' means, a line a marker."""
    figure = Figure((5.6, 3.0), facecolor="white", layout="constrained")
    for ax, (what, part) in zip(figure.subplots(1, 2, sharey=True), table.groupby("what", sort=False), strict=True):
        for k, (marker, one) in enumerate(part.groupby("marker", sort=False)):
            ax.plot(one["level"], one["value"], "o-", ms=3, lw=1.4, color=LINES[k % len(LINES)], label=marker)
        ax.plot([0.4, 1], [0.4, 1], color=SOFT, lw=0.8, ls=(0, (4, 3)))
        ax.set_title({"pixels": "pixels", "cell": "cells' means"}[str(what)], **STYLE)
        ax.set_xlabel("promised", **STYLE)
        _clean(ax, "y")
    figure.axes[0].set_ylabel("within", **STYLE)
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    return encode(figure)


def _scale_bar(
    figure: Figure, total: tuple[float, float], grid: tuple[float, float, float], pixels: int, size_um: float | None
) -> None:
    left, side, _ = grid
    length, says = scale_bar(pixels, size_um)
    end = left + side * length / pixels
    line = figure.add_axes((left / total[0], 0.16 / total[1], (end - left) / total[0], 0.035 / total[1]))
    line.set_facecolor(INK)
    line.set(xticks=[], yticks=[])
    figure.text((end + 0.08) / total[0], 0.1 / total[1], says, fontsize=9, color=INK)


def forest(
    rows: Sequence[tuple[str, Sequence[tuple[str, float, float, float]]]],
    label: str,
    chance: float | None = None,
    *,
    width: float = 7.2,
) -> str:
    """Draw values with intervals: (name, [(kind, value, low, high), ...]) a row, kinds coloured as in `COLOURS`."""
    kinds = [k for k in COLOURS if any(k == kind for _, points in rows for kind, *_ in points)]
    step = 0.125
    heights = [max(len(points), 2) * step + 0.17 for _, points in rows]
    tall = sum(heights) + 0.55
    columns = 3 if width > 6 else 2
    figure = Figure((width, tall + 0.24 * math.ceil(len(kinds) / columns)), facecolor="white", layout="constrained")
    ax = figure.subplots()
    if chance is not None:
        ax.axvline(chance, color=SOFT, lw=0.9, ls=(0, (4, 3)), zorder=0)
    y, ticks = 0.0, []
    for (_, points), height in zip(rows, heights, strict=True):
        ticks.append(y + (len(points) - 1) * step / 2)
        for i, (kind, value, low, high) in enumerate(points):
            at = y + i * step
            ax.plot([low, high], [at, at], color=COLOURS[kind], lw=1.8, solid_capstyle="butt", alpha=0.75)
            ax.plot(value, at, "o", ms=4.6, color=COLOURS[kind])
        y += height
        ax.axhline(y - 0.17 / 2 - step, color=RULE, lw=0.6, zorder=0)
    ax.set_ylim(y - step - 0.05, -step)
    ax.set_yticks(ticks, [name for name, _ in rows], **STYLE)
    ax.set_xlabel(label, **STYLE)
    _clean(ax, "x")
    ax.spines["left"].set_visible(False)
    handles = [ax.plot([], [], "o-", ms=4.6, lw=1.8, color=COLOURS[k], label=SAID[k])[0] for k in kinds]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=8, labelcolor=INK)
    return encode(figure)


def scatter(pairs: Mapping[str, tuple[NDArray[Any], NDArray[Any], str]]) -> str:
    """Mean intensity of each cell, a panel a marker: (real, predicted, caption); the line is equality."""
    figure, axes = _grid(len(pairs), 4, 1.85)
    for ax, (marker, (real, predicted, caption)) in zip(axes, pairs.items(), strict=False):
        low, high = (
            float(f([real.min(), predicted.min()] if f is min else [real.max(), predicted.max()])) for f in (min, max)
        )
        ax.plot([low, high], [low, high], color=SOFT, lw=0.8)
        size = float(np.clip(900 / max(len(real), 1), 1.2, 9))
        ax.scatter(real, predicted, s=size, alpha=0.45, color=BLUE, linewidths=0, rasterized=True)
        ax.set_title(f"{marker}\n{caption}", **STYLE)
        ax.set_xlabel("real", **STYLE)
        ax.set_ylabel("predicted", **STYLE)
        _clean(ax)
    return encode(figure)


def effects(panels: Mapping[str, tuple[NDArray[Any], NDArray[Any], Sequence[str]]]) -> str:
    """Draw Cohen's d of each feature, a panel a marker: (real, predicted, family of each); the line is equality."""
    figure, axes = _grid(len(panels), 4, 1.95)
    families = list(dict.fromkeys(f for _, _, each in panels.values() for f in each))
    palette = dict(zip(families, (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY), strict=False))
    for ax, (marker, (real, predicted, each)) in zip(axes, panels.items(), strict=False):
        reach = 1.08 * max(float(np.nanmax(np.abs([real, predicted]), initial=0.0)), 0.5)
        ax.axhline(0, color=RULE, lw=0.8, zorder=0)
        ax.axvline(0, color=RULE, lw=0.8, zorder=0)
        ax.plot([-reach, reach], [-reach, reach], color=SOFT, lw=0.8, zorder=0)
        for name in families:
            mine = np.array([f == name for f in each])
            ax.scatter(real[mine], predicted[mine], s=13, color=palette[name], alpha=0.85, linewidths=0)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        ax.set_title(marker, **STYLE)
        ax.set_xlabel("d, real", **STYLE)
        ax.set_ylabel("d, predicted", **STYLE)
        _clean(ax)
    handles = [axes[0].plot([], [], "o", ms=4.6, color=palette[f], label=f)[0] for f in families]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return encode(figure)


def training_curves(table: pd.DataFrame) -> str | None:
    """Loss by epoch, a panel a stage, training light and validation groups dark; None where nothing was logged."""
    if table.empty or not {"stage", "split", "step", "epoch"} <= set(table):
        return None
    hidden = {"step", "epoch", "stage", "split", "time_s", "cells_per_s"}
    stages = list(dict.fromkeys(table["stage"]))
    figure, axes = _grid(len(stages), 2, 2.4, width=3.6)
    for ax, stage in zip(axes, stages, strict=False):
        part = table[table["stage"] == stage]
        found = [
            c
            for c in part.columns
            if c not in hidden and pd.api.types.is_numeric_dtype(part[c]) and part[c].notna().any()
        ]
        names = [c for c in ("total", "loss") if c in found][:1] or found
        for colour, name in zip((BLUE, ORANGE, GREEN, PINK, YELLOW, SKY), names, strict=False):
            for split, alpha in (("train", 0.4), ("val", 1.0)):
                curve = part[part["split"] == split].dropna(subset=[name])
                if curve.empty:
                    continue
                said = {"train": "training groups", "val": "validation groups"}[split]
                ax.plot(
                    curve["step"],
                    curve[name],
                    color=colour,
                    alpha=alpha,
                    lw=1.6,
                    label=f"{name}, {said}",
                    marker="o" if len(curve) < 3 else "",
                    ms=3,
                )
        ax.set_title(f"stage: {stage}", **STYLE)
        ax.set_xlabel("step", **STYLE)
        ax.set_ylabel("loss", **STYLE)
        ax.legend(frameon=False, fontsize=7.5, labelcolor=INK)
        _clean(ax)
    return encode(figure)


def latent_maps(points: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], colours: Mapping[str, Any]) -> str:
    """Points of each latent (rows), (cells, (n, 2)), coloured by each label or factor (columns).

    `colours` holds text (classes) or floats (viridis) of all cells.
    """
    rows, columns = len(points), len(colours)
    width = 7.2 / max(columns, 3)
    figure, grid = _grid(rows * columns, columns, width, width=width)
    for i, (name, (cells, places)) in enumerate(points.items()):
        for j, (title, colour) in enumerate(colours.items()):
            ax = grid[i * columns + j]
            _colour_points(figure, ax, places, np.asarray(colour)[cells], explain=i == rows - 1)
            ax.set_title(f"by {title}" if i == 0 else "", **STYLE)
            ax.set_ylabel(name if j == 0 else "", **STYLE)
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_color(RULE)
    return encode(figure)


def _colour_points(figure: Figure, ax: Axes, points: NDArray[Any], colour: NDArray[Any], *, explain: bool) -> None:
    """Draw the dots; the last row of a column explains its colours below."""
    size = float(np.clip(2000 / max(len(points), 1), 1.5, 9))
    if colour.dtype.kind == "f":
        low, high = np.nanpercentile(colour, (2, 98)) if np.isfinite(colour).any() else (0, 1)
        dots = ax.scatter(
            points[:, 0], points[:, 1], c=colour, s=size, cmap="viridis", vmin=low, vmax=high, linewidths=0
        )
        if explain:
            bar = figure.colorbar(dots, ax=ax, location="bottom", shrink=0.8, aspect=22, pad=0.04)
            bar.ax.tick_params(labelsize=8, colors=SOFT, length=2)
            bar.outline.set_visible(False)
        return
    classes = sorted(set(colour))
    for k, value in enumerate(classes[: len(LINES)]):  # the first eight classes; more colours could not be told apart
        x, y = points[colour == value].T
        ax.scatter(x, y, s=size, color=LINES[k], label=str(value), linewidths=0, alpha=0.8)
    if explain:
        place: dict[str, Any] = {
            "loc": "upper center",
            "bbox_to_anchor": (0.5, -0.02),
            "ncols": 2,
            "columnspacing": 0.8,
        }
        ax.legend(frameon=False, fontsize=8, markerscale=2.2, handletextpad=0.1, labelcolor=INK, **place)


def encode(figure: Figure, dpi: int = 130) -> str:
    """Return the figure as a ``data:`` address, so that the report needs no second file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _grid(count: int, columns: int, height: float, width: float = 1.8) -> tuple[Figure, list[Axes]]:
    columns = max(min(count, columns), 1)
    rows = math.ceil(count / columns)
    figure = Figure((max(columns * width, 1), max(rows * height, 1)), facecolor="white", layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel())
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes


def _clean(ax: Axes, grid: Literal["x", "y"] | None = None) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        ax.spines[side].set_color(RULE)
    ax.tick_params(colors=SOFT, labelsize=8, length=2.5, color=RULE)
    ax.tick_params(axis="y", labelcolor=INK if grid == "x" else SOFT)
    if grid:
        ax.grid(axis=grid, color=RULE, lw=0.5)
        ax.set_axisbelow(True)
