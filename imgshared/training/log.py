"""What a run says while it runs: a progress bar, `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """The log of a run folder; on ranks above 0 it is silent.

    Parameters
    ----------
    run
        The run folder.
    step
        Entries after this step, left by an interrupted run, are dropped, so that a resumed log has no doubles.
    active
        False on ranks above 0.
    """

    def __init__(self, run: Path, step: int, *, active: bool, console: Console) -> None:
        self.active, self.console = active, console
        if not active:
            return
        self._path = run / "metrics.jsonl"
        self._seconds = _truncate(self._path, step)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._started = time.monotonic()
        self._progress = Progress(
            _fixed("{task.description}", 9),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            _fixed("left  {task.fields[cells_per_s]:,.0f} cells/s", 19),
            TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True)),
            console=console,
        )
        self._progress.start()

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a stage of so many steps, some of them done."""
        if self.active:
            for task in self._progress.task_ids:
                self._progress.stop_task(task)
            self._task = self._progress.add_task(name, total=total, completed=done, cells_per_s=0.0, losses="")

    def advance(self, steps: int, cells_per_s: float, losses: str) -> None:
        """Move the bar."""
        if self.active:
            while "  " in losses and len(losses) > self.console.width - 66:  # else the bar is squeezed to nothing
                losses = losses.rpartition("  ")[0]
            self._progress.update(self._task, advance=steps, cells_per_s=cells_per_s, losses=losses)

    def record(self, step: int, epoch: int, stage: str, split: str, values: Mapping[str, float]) -> None:
        """Write one line of `metrics.jsonl` and its scalars to TensorBoard."""
        if not self.active:
            return
        seconds = self._seconds + time.monotonic() - self._started
        row: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "stage": stage,
            "split": split,
            "time_s": round(seconds, 3),
        }
        self._file.write(json.dumps(row | {k: float(v) for k, v in values.items()}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{split}/{name}", value, step)

    def picture(self, pixels: NDArray[np.uint8] | None, step: int) -> None:
        """Show a (Y, X) picture of fixed cells in TensorBoard."""
        if self.active and pixels is not None:
            self._board.add_image("samples", pixels, step, dataformats="HW")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.active:
            self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the bar and close the files."""
        if self.active:
            self._progress.stop()
            self._file.close()
            self._board.close()


def _fixed(text: str, width: int) -> TextColumn:
    """A column that a narrow terminal does not squeeze."""
    return TextColumn(text, table_column=Column(no_wrap=True, min_width=width))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`; a last line that was cut off is left out."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _truncate(path: Path, step: int) -> float:
    """Keep the lines up to a step; return the seconds that the run had taken by then."""
    rows = [r for r in read_metrics(path.parent) if r["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(r) + "\n" for r in rows))
    partial.replace(path)
    return float(rows[-1]["time_s"]) if rows else 0.0
