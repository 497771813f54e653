"""The file of scores and answers that ``tools/accuracy.py --out`` writes."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from moiie_megatron.config.section import Fraction
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.json_file import read_json_object


class Outcome(BaseModel):
    """One question and the model's answers."""

    model_config = ConfigDict(strict=True)

    question: str = ""
    images: list[str] = []
    expected: str
    answer: str
    blanked_answer: str


class Accuracy(BaseModel):
    """A number of questions and the fractions (0..1) of right answers."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    questions: NonNegativeInt
    accuracy: Fraction
    blanked_accuracy: Fraction


class Scores(Accuracy):
    """The whole file; ``images`` is the directory that image paths are relative to."""

    by_kind: dict[str, Accuracy] = Field({})
    images: str = ""
    outcomes: list[Outcome] = []


def read_scores(path: str | Path) -> Scores:
    """Read a file of scores.

    Raises:
        UserError: The file cannot be read, or that tool did not write it.
    """
    advice = f"evaluate the run with tools/accuracy.py --out {path}"
    values = read_json_object(path, advice)
    try:
        return Scores.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} holds no scores ({key}: {first['msg']}): {advice}.") from None
