"""``OUTPUT/validation.jsonl``: the losses on held-out samples, one line per validation.

A line has ``step``, ``seconds``, ``skipped_samples`` (that could not be read), and of all samples

- ``loss``: cross-entropy averaged over their label tokens;
- ``samples``, ``label_tokens``: how many there are;
- ``image_fraction``: image tokens per token, without padding.

The same four are in ``image_counts`` (samples of text only, with one image, with several), in
``sources`` by the name of the source, and there again in its ``image_counts``.  A group without
samples is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from moiie_megatron.data.stream.example import SkippedSample

VALIDATION_FILE: Final = "validation.jsonl"
IMAGE_COUNTS: Final = ("text_only", "one_image", "several_images")
COUNTS: Final = ("samples", "label_tokens", "tokens", "image_tokens")


@dataclass(frozen=True)
class GroupSums:
    """Some of the samples.

    Attributes:
        loss_sum: Of their label tokens.
        samples: Their number; the other counts are of their tokens, without padding.
    """

    loss_sum: float = 0.0
    samples: int = 0
    label_tokens: int = 0
    tokens: int = 0
    image_tokens: int = 0

    def __add__(self, other: GroupSums) -> GroupSums:
        return GroupSums(
            self.loss_sum + other.loss_sum,
            self.samples + other.samples,
            self.label_tokens + other.label_tokens,
            self.tokens + other.tokens,
            self.image_tokens + other.image_tokens,
        )

    @property
    def loss(self) -> float:
        """Per label token; 0 without samples."""
        return self.loss_sum / max(self.label_tokens, 1)

    @property
    def image_fraction(self) -> float:
        """Image tokens per token."""
        return self.image_tokens / max(self.tokens, 1)

    def to_json(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "samples": self.samples,
            "label_tokens": self.label_tokens,
            "image_fraction": self.image_fraction,
        }


@dataclass(frozen=True)
class Validation:
    """The losses on all samples.

    Attributes:
        by_source: For every source the sums by number of images, in the order of ``IMAGE_COUNTS``.
        seconds: What it took.
        skipped: Samples that could not be read, in their order.
    """

    by_source: Mapping[str, Sequence[GroupSums]]
    seconds: float = field(default=0.0, compare=False)
    skipped: tuple[SkippedSample, ...] = ()

    @property
    def total(self) -> GroupSums:
        """All samples."""
        return _sum(part for parts in self.by_source.values() for part in parts)

    @property
    def sources(self) -> dict[str, GroupSums]:
        """The samples of every source."""
        return {name: _sum(parts) for name, parts in self.by_source.items()}

    @property
    def image_counts(self) -> dict[str, GroupSums]:
        """The samples without, with one and with several images, over all sources, if any."""
        return _present([_sum(parts) for parts in zip(*self.by_source.values(), strict=True)])

    def to_json(self) -> dict[str, Any]:
        """The line of the file, without its step."""
        sources = self.sources
        return {
            **self.total.to_json(),
            "image_counts": {name: part.to_json() for name, part in self.image_counts.items()},
            "sources": {
                name: {
                    **sources[name].to_json(),
                    "image_counts": {one: part.to_json() for one, part in _present(parts).items()},
                }
                for name, parts in self.by_source.items()
            },
            "skipped_samples": len(self.skipped),
            "seconds": self.seconds,
        }

    def scalars(self) -> dict[str, float]:
        """The losses by their name in TensorBoard."""
        losses = {"validation/loss": self.total.loss}
        losses |= {f"validation/source/{name}": p.loss for name, p in self.sources.items()}
        return losses | {f"validation/{name}": p.loss for name, p in self.image_counts.items()}

    def __str__(self) -> str:
        total = self.total
        losses = [f"loss {total.loss:.4f}"]
        image_counts = {shown(name): part for name, part in self.image_counts.items()}
        for parts in (self.sources, image_counts):
            if len(parts) > 1:  # the only one is all
                losses += [f"{name} {part.loss:.4f}" for name, part in parts.items()]
        skipped = f", {len(self.skipped)} could not be read" if self.skipped else ""
        return (
            " | ".join(losses) + f" ({total.samples} samples, {total.label_tokens} label tokens"
            f"{skipped}, {self.seconds:.1f} s)"
        )


def shown(image_count: str) -> str:
    """One of ``IMAGE_COUNTS`` for people."""
    return image_count.replace("_", " ")


def _sum(parts: Iterator[GroupSums] | Sequence[GroupSums]) -> GroupSums:
    return sum(parts, start=GroupSums())


def _present(parts: Sequence[GroupSums]) -> dict[str, GroupSums]:
    return {name: part for name, part in zip(IMAGE_COUNTS, parts, strict=True) if part.samples}
