"""Reads the report of ``prepare_data.py validate``: how many samples of each size a mixture has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import ValidationError as _ValidationError

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.json_file import read_json_object

_PROGRAM = "prepare_data.py validate CONFIG --json FILE"


@dataclass(frozen=True, eq=False)
class SourceShapes:
    """The samples of one source: entries of samples that are alike.

    Attributes:
        name: For messages.
        weight: How often an epoch visits every sample.
        records: Its records; those that the entries do not count are skipped.
        samples: int64 (n,), samples of every entry, at least 1.
        images: int64 (n,), images of each of them.
        tokens: int64 (n,), their tokens in all, images included.
        labels: int64 (n,), their labels in all.
        most_labels: int64 (n,), the largest number of labels of one of them.
    """

    name: str
    weight: float
    records: int
    samples: np.ndarray
    images: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    most_labels: np.ndarray


@dataclass(frozen=True, eq=False)
class DataReport:
    """The samples of a mixture, truncated to the sequence length.

    Attributes:
        name: Of the file.
        sequence_length: The longest sample, in tokens.
        num_image_tokens: Positions per image.
        sources: In the order of the configuration.
    """

    name: str
    sequence_length: int
    num_image_tokens: int
    sources: tuple[SourceShapes, ...]

    def check(self, config: RunConfig) -> None:
        """Refuse a configuration whose samples have other sizes.

        Raises:
            UserError: Another sequence length, or another number of tokens per image.
        """
        for key, reported, planned in (
            ("data.sequence_length", self.sequence_length, config.data.sequence_length),
            (
                "the number of tokens of an image",
                self.num_image_tokens,
                config.vision.num_image_tokens,
            ),
        ):
            if reported != planned:
                raise UserError(
                    f"{self.name} was made with {reported} as {key}, the configuration has "
                    f"{planned}: make it again with {_PROGRAM}."
                )


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Shapes(_Part):
    images: list[NonNegativeInt]
    samples: list[PositiveInt]
    tokens: list[PositiveInt]
    labels: list[NonNegativeInt]
    most_labels: list[NonNegativeInt]


class _Source(_Part):
    name: str
    weight: PositiveFloat
    samples: NonNegativeInt
    shapes: _Shapes | None


class _Encoding(_Part):
    sequence_length: PositiveInt
    num_image_tokens: PositiveInt


class _Report(_Part):
    encoding: _Encoding
    sources: list[_Source]


def read_report(path: str | Path) -> DataReport:
    """The report in a file.

    Raises:
        UserError: The file cannot be read, is no report, is an older one without the histogram,
            was made without a tokenizer, or has no sample that can be used.
    """
    values = read_json_object(path, f"name a file that {_PROGRAM} has written")
    again = f"make it again with {_PROGRAM}"
    listed = values.get("sources")
    if not isinstance(listed, list) or not all(isinstance(source, dict) for source in listed):
        raise UserError(f"{path} is no report of prepare_data.py validate: {again}.")
    if "encoding" not in values:
        raise UserError(f"{path} is an older report without a histogram of lengths: {again}.")
    if values["encoding"] is None:
        raise UserError(f"{path} was made without a tokenizer and has no lengths: {again}.")
    try:
        report = _Report.model_validate(values)
    except _ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path} is no report of prepare_data.py validate ({where}: {first['msg']}): {again}."
        ) from error
    for source in report.sources:
        problem = _problem(source, report.encoding)
        if problem is not None:
            raise UserError(f"{path} contradicts itself ({source.name} has {problem}): {again}.")
    if not any(source.shapes for source in report.sources):
        raise UserError(f"{path} counts no sample that can be used: repair the data first.")
    return DataReport(
        Path(path).name,
        report.encoding.sequence_length,
        report.encoding.num_image_tokens,
        tuple(map(_shapes, (source for source in report.sources if source.samples))),
    )


def _shapes(source: _Source) -> SourceShapes:
    shapes = source.shapes or _Shapes(images=[], samples=[], tokens=[], labels=[], most_labels=[])
    columns: dict[str, Any] = {
        name: np.array(column, np.int64) for name, column in shapes.model_dump().items()
    }
    return SourceShapes(source.name, source.weight, source.samples, **columns)


def _problem(source: _Source, encoding: _Encoding) -> str | None:
    """What cannot be true of a source; None if nothing is."""
    shapes = source.shapes
    if shapes is None:
        return None
    if len({len(column) for column in shapes.model_dump().values()}) > 1:
        return "columns of different lengths"
    if sum(shapes.samples) > source.samples:
        return f"{sum(shapes.samples)} samples of {source.samples} records"
    for images, samples, tokens, labels in zip(
        shapes.images, shapes.samples, shapes.tokens, shapes.labels, strict=True
    ):
        image_tokens = images * encoding.num_image_tokens * samples
        if not image_tokens + labels <= tokens <= encoding.sequence_length * samples:
            return f"{tokens} tokens in {samples} samples of {images} images with {labels} labels"
    return None
