"""What a user should know of the training cells and of a training as it goes, a sentence each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields

from torch import Tensor

from imgshared.config.schema import TrainConfig
from imgshared.data.panel import Panel
from imgshared.methods.base import FEW_CELLS, Method, Stage
from imgshared.types import InputError


def about_cells(method: Method, panel: Panel, measured: Tensor, left_out: int) -> Iterator[str]:
    """Yield what there is to doubt of the training cells.

    Parameters
    ----------
    measured
        (N, C) bool, what they show.
    left_out
        How many more show no stain of the panel.
    """
    if left_out:
        yield f"{left_out} training cells show no stain of the panel and are left out"
    for marker, count in zip(panel.markers, measured.sum(0).tolist(), strict=True):
        if count < FEW_CELLS:
            yield f"{marker} is measured in {count} training cells alone: expect little of it"
    yield from method.doubts(measured, panel.markers)


def refuse_ignored(config: TrainConfig, stages: Sequence[Stage]) -> None:
    """Refuse settings of the training that these stages would not use.

    Raises
    ------
    InputError
        Names the setting, why it has no effect and its default.
    """
    groups = (
        (not any(stage.learns for stage in stages), "nothing is learnt by steps",
         ("ema", "gradient_clip", "diverged")),
        (not any(stage.monitored and stage.epochs > 1 for stage in stages), "no held-out loss may end a stage",
         ("patience",)),
    )  # fmt: skip
    for ignored, why, names in groups:
        for name in names if ignored else ():
            default = next(f.default for f in fields(TrainConfig) if f.name == name)
            if getattr(config, name) != default:
                raise InputError(f"train.{name} has no effect here, for {why}: leave it out, or set it to {default}")


def refuse_other_epochs(config: TrainConfig, method: Method) -> None:
    """Refuse epochs that are not every cell once, where a method needs that.

    Raises
    ------
    InputError
        Names the setting, why it cannot be and what to do.
    """
    if method.tables and config.balance == "panels":
        raise InputError("train.balance=panels may draw a cell twice at once, which free latents cannot: use cells")
    each = method.tables or any(stage.whole for stage in method.stages)
    if each and config.balance == "panels":
        raise InputError(
            "train.balance=panels leaves out cells and repeats others, and here each counts once: use cells"
        )
    if each and config.steps_per_epoch:
        raise InputError(
            f"train.steps_per_epoch={config.steps_per_epoch} leaves cells out of an epoch, and here each counts once: "
            "leave it out"
        )


class Notes:
    """Says each trouble once a run, however its numbers change.

    Parameters
    ----------
    say
        Shows a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._said = say, set[str]()

    def of_run(self, sentences: Iterable[str]) -> None:
        """Say what is so from the start."""
        for sentence in sentences:
            self._once(sentence, f"[yellow]note:[/] {sentence}")

    def of_epoch(self, epoch: int, troubles: Mapping[str, str]) -> None:
        """Say what has shown up in an epoch: a name of each trouble, and a sentence whose numbers may change."""
        for trouble, sentence in troubles.items():
            self._once(trouble, f"[yellow]note, epoch {epoch}:[/] {sentence}")

    def _once(self, trouble: str, line: str) -> None:
        if trouble not in self._said:
            self._said.add(trouble)
            self._say(line)
