"""The base of all sections of a configuration, and the types of its numbers.

Every number has limits, so that what the schema accepts fits the types that compute with it: whole
numbers fit 32 bits, others and their inverses fit fp32.  ``messages.describe`` leaves these wide
limits out where they are not the problem.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

MAX_INT: Final = 2**31 - 1
MAX_SEED: Final = 2**63 - 1  # torch takes 64 bits; ranks and stages add small numbers
MIN_FLOAT: Final = 1e-30  # of numbers that must not be 0
MAX_FLOAT: Final = 1e30

Text = Annotated[str, Field(min_length=1)]
PositiveInt = Annotated[int, Field(gt=0, le=MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_INT)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
PositiveFloat = Annotated[float, Field(ge=MIN_FLOAT, le=MAX_FLOAT)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=MAX_FLOAT)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FractionBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the configuration: immutable, strict about types, without unknown keys.

    The description of every field is shown in ``docs/configuration.md``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
