"""Reads ``routing.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from moiie_megatron.routing_stats.version import VERSION
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.jsonl import Records, broken_line, read_records

ExpertName = Annotated[str, Field(pattern=r"^(vision|shared|text)\.[0-9]{1,4}$")]
LayerName = Annotated[str, Field(pattern=r"^[0-9]{1,6}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Modality(_Part):
    tokens: NonNegativeFloat
    load: list[NonNegativeFloat]
    entropy: float | None


class _Layer(_Part):
    vision: _Modality
    text: _Modality
    max_over_mean: float | None
    dead: list[NonNegativeInt]


class _Moved(_Part):
    rows: NonNegativeFloat
    remote_rows: NonNegativeFloat
    bytes: NonNegativeFloat


class _Record(_Part):
    """What the readers of a record need of it (``routing_stats/record.py``)."""

    experts: Annotated[list[ExpertName], Field(min_length=1)]
    top_k: PositiveInt
    ranks: list[list[NonNegativeInt]]
    layers: Annotated[dict[LayerName, _Layer], Field(min_length=1)]
    moved: dict[str, _Moved]


class _TrainingRecord(_Record):
    step: PositiveInt
    steps: PositiveInt


def read_routing(path: str | Path, *, of_training: bool = False) -> Records:
    """The records of ``routing.jsonl`` (``routing_stats/record.py``), in order.

    Args:
        path: The file.
        of_training: Every record must say which steps it covers.

    Raises:
        UserError: The file cannot be read, is damaged before its end, holds no record, or one
            of another version or with other values.
    """
    records = read_records(path)
    if not records:
        raise UserError(f"{path} holds no routing records: only runs with experts write some.")
    for number, record in enumerate(records, start=1):
        if record.get("version") != VERSION:
            raise UserError(
                f"{path}, line {number} has a routing record of version {record.get('version')}, "
                f"this program reads version {VERSION}: use the program that wrote it."
            )
        problem = _problem(record, of_training or "step" in record)
        if problem is not None:
            raise broken_line(path, number, f"is no routing record ({problem})")
    return records


def newest(records: Records, steps: int) -> Records:
    """The last records that cover at least this many steps (all, if there are fewer)."""
    covered, start = 0, len(records)
    while start and covered < steps:
        start -= 1
        covered += records[start].get("steps", 1)
    return records[start:]


def _problem(record: dict[str, Any], of_training: bool) -> str | None:
    """What is wrong with a record; None if nothing is."""
    try:
        read = (_TrainingRecord if of_training else _Record).model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    experts = len(read.experts)
    for number, layer in read.layers.items():
        if {len(layer.vision.load), len(layer.text.load)} != {experts}:
            return f"layers.{number}: a load has not {experts} experts"
        if any(expert >= experts for expert in layer.dead):
            return f"layers.{number}.dead: there are {experts} experts"
    return None
