"""The losses on held-out samples that a run has logged, for reports and comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, ValidationError

from moiie_megatron.training.validation.result import VALIDATION_FILE, shown
from moiie_megatron.utils.jsonl import Records, broken_line, read_records

ALL = "all samples"  # a name that no source has


class _Group(BaseModel):
    loss: float
    samples: NonNegativeInt
    label_tokens: NonNegativeInt
    image_fraction: float


class _Line(_Group):
    step: NonNegativeInt
    sources: dict[str, _Group]
    image_counts: dict[str, _Group]

    def parts(self) -> dict[str, _Group]:
        """All samples; those of every source, and by number of images, unless that is all."""
        parts: dict[str, _Group] = {ALL: self}
        image_counts = {shown(name): one for name, one in self.image_counts.items()}
        for group in (self.sources, image_counts):
            parts |= group if len(group) > 1 else {}
        return parts


@dataclass(frozen=True)
class Validations:
    """The validations of one run.

    Attributes:
        curves: By step: ``step``, and the losses of all samples (``ALL``), of every source and
            by number of images, by their names.
        rows: For each of them its last and its lowest loss, and what it was measured on.
    """

    curves: Records
    rows: list[dict[str, Any]]


def read_validations(run: Path) -> Validations:
    """The validations in a run's output directory; none without the file.

    Args:
        run: The output directory.

    Raises:
        UserError: The file cannot be read, or has a line that is none of a validation.
    """
    path = run / VALIDATION_FILE
    if not path.exists():
        return Validations([], [])
    by_step: dict[int, dict[str, _Group]] = {}
    for number, record in enumerate(read_records(path), start=1):
        try:
            line = _Line.model_validate(record)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise broken_line(path, number, f"is no validation ({key}: {problem['msg']})") from None
        by_step[line.step] = line.parts()
    curves = [
        {"step": step, **{name: part.loss for name, part in parts.items()}}
        for step, parts in sorted(by_step.items())
    ]
    names = dict.fromkeys(name for parts in by_step.values() for name in parts)
    return Validations(curves, [_row(name, by_step) for name in names])


def _row(name: str, by_step: Mapping[int, Mapping[str, _Group]]) -> dict[str, Any]:
    found = {step: parts[name] for step, parts in sorted(by_step.items()) if name in parts}
    losses: Sequence[tuple[float, int]] = [(part.loss, step) for step, part in found.items()]
    finite = [one for one in losses if math.isfinite(one[0])]
    lowest, lowest_step = min(finite) if finite else losses[0]
    last, last_step = losses[-1]
    part = found[last_step]
    return {
        "name": name,
        "last": f"{last:.4f}",
        "last_step": f"{last_step:,}",
        "lowest": f"{lowest:.4f}",
        "lowest_step": f"{lowest_step:,}",
        "samples": f"{part.samples:,}",
        "label_tokens": f"{part.label_tokens:,}",
        "image_fraction": f"{part.image_fraction:.0%}",
    }
