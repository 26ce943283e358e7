"""A panel: the ordered markers of a store or a model, one of them the chromatin stain."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from imgshared.types import InputError

# The surest first: H3 is a protein where a dye stains chromatin.
CHROMATIN_NAMES = ("dna", "dapi", "hoechst", "hoechst33342", "draq5", "draq", "chromatin", "dna1", "h3")
# Ends of the names of channels that a model has predicted, and of those that say how far to trust them.
IMPUTED, UNCERTAINTY, ABSTAIN = "_imputed", "_uncertainty", "_abstain"


def is_imputed(name: str) -> bool:
    """Say whether a channel of this name was predicted, or says how far to trust one that was: never a measurement."""
    return name.lower().endswith((IMPUTED, IMPUTED + UNCERTAINTY, IMPUTED + ABSTAIN))


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Name the closest candidate for an error message, e.g. ``" Did you mean 'DNA'?"``; empty where none is close."""
    by_lower = {c.lower(): c for c in candidates}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


@dataclass(frozen=True)
class Panel:
    """Ordered markers.

    Parameters
    ----------
    markers
        Marker names; the position is the channel index.
    chromatin
        The marker that stains chromatin.
    aliases
        Other names by which a marker is found, e.g. ``{"LaminB1": ("LMNB1",)}``.

    Raises
    ------
    InputError
        Where two markers answer to one name, or the chromatin marker is not among the markers.
    """

    markers: tuple[str, ...]
    chromatin: str
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for marker in self.markers:
            for name in {marker.lower(), *(a.lower() for a in self.aliases.get(marker, ()))}:
                if name in seen:
                    raise InputError(
                        f"markers {seen[name]!r} and {marker!r} both answer to the name {name!r}: rename one"
                    )
                seen[name] = marker
        if self.chromatin not in self.markers:
            raise InputError(
                f"chromatin marker {self.chromatin!r} is not among the markers {', '.join(self.markers)}."
                f"{nearest(self.chromatin, self.markers)}"
            )

    def __len__(self) -> int:
        return len(self.markers)

    @property
    def chromatin_index(self) -> int:
        """Channel of the chromatin stain."""
        return self.markers.index(self.chromatin)

    @property
    def proteins(self) -> tuple[str, ...]:
        """Every marker but chromatin, in order."""
        return tuple(m for m in self.markers if m != self.chromatin)

    def find(self, name: str) -> int | None:
        """Return the channel of a marker found by name or alias, without regard to case; None where there is none."""
        wanted = name.lower()
        for channel, marker in enumerate(self.markers):
            if wanted == marker.lower() or wanted in (a.lower() for a in self.aliases.get(marker, ())):
                return channel
        return None

    def index(self, name: str) -> int:
        """Return the channel of a marker found by name or alias, without regard to case.

        Raises
        ------
        InputError
            Where no marker answers to the name; the message gives the nearest one.
        """
        channel = self.find(name)
        if channel is None:
            raise InputError(f"no marker {name!r} in the panel {', '.join(self.markers)}.{nearest(name, self.markers)}")
        return channel

    def indices(self, names: Sequence[str]) -> list[int]:
        """Return the channels of several markers."""
        return [self.index(name) for name in names]


def guess_chromatin(markers: Sequence[str]) -> str | None:
    """Return the marker that has the surest of the usual names of a chromatin stain, or None."""
    named = {m.lower().replace(" ", "").replace("-", ""): m for m in reversed(markers)}
    return next((named[name] for name in CHROMATIN_NAMES if name in named), None)
