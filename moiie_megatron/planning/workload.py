"""What one rank gets to process in a step: samples in rows, rows in micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class SampleShape:
    """A sample without its content.

    Attributes:
        tokens: Tokens, image tokens included.
        images: Images.
        labels: Tokens with a label; text tokens only.
    """

    tokens: int
    images: int
    labels: int


@dataclass(frozen=True)
class MicroBatchShape:
    """A micro-batch without its content.

    Attributes:
        rows: The samples of every row; more than one in a row only with packing.
        length: Tokens of a row, padding included.
    """

    rows: tuple[tuple[SampleShape, ...], ...]
    length: int

    @property
    def samples(self) -> Iterator[SampleShape]:
        return (sample for row in self.rows for sample in row)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(sample.tokens for sample in self.samples)

    @property
    def images(self) -> int:
        return sum(sample.images for sample in self.samples)

    @property
    def positions(self) -> int:
        """Tokens with padding."""
        return len(self.rows) * self.length


@dataclass(frozen=True)
class Workload:
    """The micro-batches of one data-parallel rank in one step.

    Attributes:
        micro_batches: In order.
        origin: Where the numbers come from, as a phrase for tables: "rows of full length with
            one image", "lengths of report.json".
    """

    micro_batches: tuple[MicroBatchShape, ...]
    origin: str
