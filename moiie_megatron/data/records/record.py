"""A conversation about images, and the error of one that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from moiie_megatron.utils.errors import UserError

PLACEHOLDER: Final = "<image>"  # marks the position of an image in the text of a record

Role = Literal["system", "user", "assistant"]


class BadRecord(UserError):
    """A record that cannot be used; the run skips it (``data/stream/skipped_samples.py``).

    Args:
        reason: What is wrong, with the offending values.
        file: Record file, filled in by the caller that knows it.
        index: Record number in that file, from 0.
    """

    def __init__(self, reason: str, file: str = "", index: int = -1) -> None:
        super().__init__(reason, file, index)
        self.reason = reason
        self.file = file
        self.index = index

    def __str__(self) -> str:
        return f"{self.file}[{self.index}]: {self.reason}" if self.file else self.reason


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; ``<image>`` in its text is the next image of the record."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """A conversation and its images, as paths below the image directory, in order of appearance.

    Attributes:
        notes: What was not used of the record, in a few words each.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)
