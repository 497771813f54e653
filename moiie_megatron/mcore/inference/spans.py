"""Which tokens one forward pass computes, and where they lie in it.

A pass has the tokens of several sequences, the rows of the cache, one behind the other: b is 1
and s counts the tokens of all.  A span begins a row, with all tokens so far, or goes on by one
token.  Two rows are begun with 3 and 2 tokens; the next pass continues both:

    pass 1   row 0: positions 0 1 2 | row 1: positions 0 1 | padding
    pass 2   row 0: position 3      | row 1: position 2

No row is padded to the length of another, so prompts of any lengths, with any numbers of images,
cost what they have.  Padding stands at the end: sequence parallelism cuts into equal parts, and
some dispatchers need as many tokens on all ranks.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Tokens of a row: positions ``start`` to ``stop`` (excluded); either all so far or one.

    Attributes:
        gap: Padding behind it.
    """

    row: int
    start: int
    stop: int
    gap: int = 0

    def __post_init__(self) -> None:
        assert self.start == 0 or self.length == 1, self

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def begins(self) -> bool:
        """Whether the row's cache is written anew."""
        return self.start == 0


@dataclass(frozen=True)
class Pass:
    """The spans of a forward pass, in order, and the padding behind them.

    Attributes:
        spans: At most one for each row.
        width: Tokens of the pass, with padding; at least 1.
    """

    spans: tuple[Span, ...]
    width: int

    @property
    def offsets(self) -> list[int]:
        """Where each span begins."""
        offsets, place = [], 0
        for span in self.spans:
            offsets.append(place)
            place += span.length + span.gap
        return offsets

    @property
    def last_places(self) -> list[int]:
        """Where the last token of each span is."""
        return [
            offset + span.length - 1 for offset, span in zip(self.offsets, self.spans, strict=True)
        ]


def common_width(passes: Sequence[Sequence[Span]], multiple_of: int) -> int:
    """The width of a pass in which several replicas take part, each with its own spans."""
    longest = max(sum(span.length + span.gap for span in spans) for spans in passes)
    return -(-max(longest, 1) // multiple_of) * multiple_of
