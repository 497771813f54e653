"""Questions with their pictures and the model's answers, ready to be shown on a page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.records.llava import PLACEHOLDER, BadRecord
from moiie_megatron.utils.errors import UserError

_SHOWN = 24
_SIDE = 192  # pixels of a picture
_WHITE = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Answer:
    """One question.

    Attributes:
        pictures: Data URIs; empty where a picture cannot be read.
        missing: Why not.
    """

    question: str
    expected: str
    answer: str
    blanked_answer: str
    is_right: bool
    pictures: tuple[str, ...]
    missing: str


@dataclass(frozen=True)
class Answers:
    """The scores of a question file and some of its questions; accuracies are shares, 0 to 1.

    Attributes:
        by_kind: Kind of question, number of questions, accuracy, accuracy on blanked pictures.
    """

    questions: int
    accuracy: float
    blanked_accuracy: float
    by_kind: tuple[tuple[str, int, float, float], ...]
    shown: tuple[Answer, ...]


def read_answers(path: str | Path) -> Answers:
    """What ``tools/evaluate.py --out`` wrote; questions are taken from all parts of the file.

    Raises:
        UserError: The file cannot be read or is none of that tool's.
    """
    try:
        scores = json.loads(Path(path).read_text(encoding="utf-8"))
        kinds = tuple(
            (kind, part["questions"], part["accuracy"], part["blanked_accuracy"])
            for kind, part in scores["by_kind"].items()
        )
        outcomes, root = scores["outcomes"], scores.get("images", "")
        shown = tuple(_answer(outcome, root) for outcome in _spread(outcomes, _SHOWN))
        return Answers(
            scores["questions"], scores["accuracy"], scores["blanked_accuracy"], kinds, shown
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"The scores {path} cannot be read ({error}).") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not hold scores ({error!r}): name what tools/evaluate.py --out wrote."
        ) from error


def _spread(outcomes: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Evenly over the whole file, which is often sorted by kind."""
    count = min(count, len(outcomes))
    return [outcomes[number * len(outcomes) // count] for number in range(count)]


def _answer(outcome: Mapping[str, Any], root: str) -> Answer:
    pictures, missing = [], ""
    for path in outcome.get("images", ()):
        try:
            pictures.append(_picture(root, path))
        except UserError as error:
            missing = error.reason if isinstance(error, BadRecord) else str(error)
    expected, answer = outcome["expected"], outcome["answer"]
    return Answer(
        question=outcome.get("question", "").replace(PLACEHOLDER, "").strip(),
        expected=expected,
        answer=answer,
        blanked_answer=outcome["blanked_answer"],
        is_right=answer.strip().casefold() == expected.strip().casefold(),
        pictures=tuple(pictures),
        missing=missing,
    )


def _picture(root: str, path: str) -> str:
    """A small PNG of the picture on white, as a data URI.

    Raises:
        UserError: The folder is gone, or the picture cannot be read.
    """
    loader = ImageLoader(root, _SIDE, "pad", _WHITE, _WHITE)
    image = Image.fromarray(loader.load(path).permute(1, 2, 0).numpy())
    stream = io.BytesIO()
    image.quantize(64).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
