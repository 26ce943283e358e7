"""Where a folder is written before it is whole, how it gets its name, and that measured images are not written over."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from imgshared.types import InputError


def partial_of(path: Path) -> Path:
    """What is unfinished lies beside, of a link beside what it leads to: on the disk where it gets its name."""
    return Path(f"{path.resolve()}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Give a finished folder its name; what had it steps aside first, so that nothing half deleted ever carries it.

    Of a link, what it leads to is replaced.
    """
    path = path.resolve()
    aside = path.with_name(f".{path.name}.replaced-{uuid4().hex}")  # nobody else's name
    if path.exists():
        path.rename(aside)
    shutil.move(partial, path)  # a link may lead to another disk
    shutil.rmtree(aside, ignore_errors=True)


def refuse_source(source: Path, places: Iterable[Path], kind: str) -> None:
    """Refuse to write where the measured images are, a store or a slide by its `kind`.

    Raises
    ------
    InputError
        Names the place, or the unfinished one beside, that is, holds or lies in what is predicted.
    """
    source = source.resolve()
    for written in (each for place in places for each in (place, partial_of(place))):
        here = written.resolve()
        if here == source or here in source.parents or source in here.parents:
            raise InputError(
                f"{written} is, holds or lies in the {kind} that is predicted: measured images are never overwritten, "
                "choose another name"
            )
