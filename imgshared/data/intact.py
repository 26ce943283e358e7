"""Whether a store on Zarr is intact: a chunk that is not there would be read as zeros, as one that was left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr

from imgshared.types import InputError

EVERY_CHUNK = "imgshared-every-chunk"  # attribute of an array: no chunk was left out for being empty


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Say which store it is that cannot be read.

    Raises
    ------
    InputError
        For what zarr, its codecs and anndata raise of damaged files.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({error}): copy it again, or write it again") from error


def promise_every_chunk(root: zarr.Group) -> None:
    """Note at each array that all its chunks were written, empty ones too; one that is written anew loses the note."""
    for _, array in _arrays(root):
        array.attrs[EVERY_CHUNK] = True


def refuse_lost_chunks(path: Path, root: zarr.Group) -> None:
    """Refuse a store that lacks chunks of arrays that promise every one; of stores written before, nothing is known.

    Looks for the files and opens none, so that it is quick for millions of cells.

    Raises
    ------
    InputError
        Counts them, and names one.
    """
    lost = list[Path]()
    for name, array in _arrays(root):
        if array.attrs.get(EVERY_CHUNK):
            sides = zip(array.shape, array.shards or array.chunks, strict=True)
            places = itertools.product(*(range(-(-length // side)) for length, side in sides))
            files = (path / name / array.metadata.encode_chunk_key(place) for place in places)
            lost += [file for file in files if not file.exists()]
    if lost:
        raise InputError(f"{path} is damaged, it lacks {len(lost)} file(s), as {lost[0]}: copy it again")


def _arrays(root: zarr.Group) -> Iterator[tuple[str, zarr.Array[Any]]]:
    return ((name, node) for name, node in root.members(max_depth=None) if isinstance(node, zarr.Array))
