"""Kinds of values that several parts of the schema use."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

CLOSED = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Channels = Annotated[tuple[Count, ...], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LENGTH = r"^\d+(\.\d+)? ?(um|µm|μm|px)$"
Length = Annotated[str, Field(pattern=LENGTH)]  # "6 um" or "12 px"
