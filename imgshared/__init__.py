"""Shared and specific information in multiplexed chromatin/protein microscopy."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgshared.api import (
        ensemble,
        evaluate,
        export,
        load_run,
        open_store,
        predict,
        predict_image,
        prepare,
        refit,
        simulate,
        train,
    )

__all__ = [
    "ensemble",
    "evaluate",
    "export",
    "load_run",
    "open_store",
    "predict",
    "predict_image",
    "prepare",
    "refit",
    "simulate",
    "train",
]
__version__ = version("imgshared")


def __getattr__(name: str) -> Any:
    """Import the verbs on first use: `import imgshared` and `imgshared --help` need no torch."""
    if name in __all__:
        return getattr(import_module("imgshared.api"), name)
    raise AttributeError(f"module 'imgshared' has no attribute {name!r}")
