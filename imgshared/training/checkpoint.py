"""A checkpoint: tensors in a safetensors file whose header carries the contract and a digest of every byte."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imgshared.data.normalise import Normaliser
from imgshared.data.panel import Panel
from imgshared.data.split import Split
from imgshared.data.store import CellStore
from imgshared.types import InputError

FORMAT = 4  # raised whenever an older checkpoint would be misread


@dataclass(frozen=True)
class Contract:
    """What a model takes for granted of its data.

    Parameters
    ----------
    panel
        Markers, order, aliases.
    crop_px, pixel_size_um, dtype
        Of the crops; pixel size None where unknown.
    mask_neighbours
        Whether the pixels of other cells are zero in a crop.
    normaliser, split
        As fitted.
    data_hash
        Of the training store.
    """

    panel: Panel
    crop_px: int
    pixel_size_um: float | None
    dtype: str
    mask_neighbours: bool
    normaliser: Normaliser
    split: Split
    data_hash: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        p = self.panel
        return {
            "markers": list(p.markers),
            "chromatin": p.chromatin,
            "aliases": {k: list(v) for k, v in p.aliases.items()},
            "crop_px": self.crop_px,
            "pixel_size_um": self.pixel_size_um,
            "dtype": self.dtype,
            "mask_neighbours": self.mask_neighbours,
            "normaliser": self.normaliser.to_dict(),
            "split": self.split.to_dict(),
            "data_hash": self.data_hash,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Contract:
        """Read back what `to_dict` wrote; a `KeyError` names a term that is not there."""
        aliases = {k: tuple(v) for k, v in data["aliases"].items()}
        return Contract(
            Panel(tuple(data["markers"]), data["chromatin"], aliases),
            data["crop_px"],
            data["pixel_size_um"],
            data["dtype"],
            data["mask_neighbours"],
            Normaliser.from_dict(data["normaliser"]),
            Split.from_dict(data["split"]),
            data["data_hash"],
        )

    def check(self, store: CellStore, needed: Sequence[str] | None = None) -> list[int | None]:
        """Return the store's channel of each of the model's markers; order is mended by name.

        Parameters
        ----------
        needed
            Markers that the store must hold; None is all. Another marker may be missing: its channel is None.

        Raises
        ------
        InputError
            Names the first term that the store breaks: a missing marker, the crop size, the pixel size, the dtype,
            whether neighbours are masked.
        """
        missing = []
        channels: list[int | None] = []
        for marker in self.panel.markers:
            names = (marker, *self.panel.aliases.get(marker, ()))
            found = [c for n in names if (c := store.panel.find(n)) is not None]
            channels.append(found[0] if found else None)
            if not found and (needed is None or marker in needed):
                missing.append(marker)
        if missing:
            raise InputError(
                f"{store.path} lacks the marker(s) {', '.join(missing)} that the model needs; it holds "
                f"{', '.join(store.panel.markers)}. If a marker goes by another name, prepare the store with aliases"
            )
        size = (
            f"prepare with pixel_size_um={self.pixel_size_um}" if self.pixel_size_um else "the model knows pixels alone"
        )
        masked = self.mask_neighbours, store.mask_neighbours
        for term, ours, theirs, mend in (
            ("crop size (px)", self.crop_px, store.crop_px, f"prepare with crop_px={self.crop_px}"),
            ("pixel size (um)", self.pixel_size_um, store.pixel_size_um, size),
            ("dtype", self.dtype, str(store.dtype), "convert the images, or train on data of this kind"),
            ("mask_neighbours", *masked, f"prepare with mask_neighbours={str(self.mask_neighbours).lower()}"),
        ):
            if not _same(ours, theirs):
                raise InputError(f"{store.path}: {term} is {theirs}, the model was trained with {ours}: {mend}")
        return channels


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 0.02 * max(a, b)  # the same objective, written with other digits
    return bool(a == b)


def save(path: Path, tree: Mapping[str, Any], contract: Contract) -> None:
    """Write nested dicts of tensors and plain values; beside first, then renamed, so `path` is always whole."""
    tensors: dict[str, Tensor] = {}
    plain = _flatten(tree, "", tensors)
    header = {
        "format": FORMAT,
        "imgshared": version("imgshared"),
        "contract": contract.to_dict(),
        "tensors": _kinds(tensors),
        "plain": plain,
    }
    text = json.dumps(header, sort_keys=True)
    metadata = {"imgshared": text, "sha256": _digest(tensors, text)}
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata)
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write the checkpoint {path}: {error}. The last one written is kept") from error


def load(path: Path) -> tuple[dict[str, Any], Contract]:
    """Read what `save` wrote, to the CPU.

    Raises
    ------
    InputError
        For a missing or damaged file, tampered bytes, or a checkpoint of another format.
    """
    if not path.exists():
        raise InputError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        text = metadata["imgshared"]
        header = json.loads(text)
        written_by = header["format"], header["imgshared"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a whole imgshared checkpoint ({error})") from error
    if written_by[0] != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {written_by[0]} (imgshared {written_by[1]}), this imgshared "
            f"{version('imgshared')} reads format {FORMAT}: train again, or use the one that wrote it"
        )
    if _digest(tensors, text) != metadata.get("sha256") or header["tensors"] != _kinds(tensors):
        raise InputError(f"{path} is damaged or was changed after training: its digest does not match")
    return _unflatten(header["plain"], tensors), Contract.from_dict(header["contract"])


def _flatten(tree: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the tensors of nested dicts to one flat dict, leaving their names behind."""
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous()
            plain[key] = {"tensor": name}
        elif isinstance(value, Mapping):
            plain[key] = {"tree": _flatten(value, f"{name}/", tensors)}
        else:
            plain[key] = {"value": value}
    return plain


def _unflatten(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, entry in plain.items():
        if "tensor" in entry:
            out[key] = tensors[entry["tensor"]]
        else:
            out[key] = _unflatten(entry["tree"], tensors) if "tree" in entry else entry["value"]
    return out


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{t.dtype} {list(t.shape)}" for name, t in tensors.items()}


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
