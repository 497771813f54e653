"""An answers file in LLaVA's format, written while questions are answered and continued later.

One JSON object per line, in the order of the questions, as LLaVA's ``model_vqa.py`` writes them:
``question_id``, ``prompt``, ``text`` (the answer), ``answer_id``, ``model_id`` and ``metadata``.
The metadata hold what else an ``Outcome`` has, and which evaluation the line belongs to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moiie_megatron.evaluation.questions import Question
from moiie_megatron.evaluation.score import Outcome
from moiie_megatron.utils.errors import UserError


class AnswersFile:
    """Appends outcomes, and reads those that an interrupted evaluation has left.

    Args:
        path: Made with its directories if it does not exist.
        model: Name of the model, for ``model_id``.
        evaluation: Digest of all that answers depend on besides the questions.

    Raises:
        UserError: The file cannot be written.
    """

    def __init__(self, path: str | Path, model: str, evaluation: str) -> None:
        self.path = Path(path)
        self.model = model
        self.evaluation = evaluation
        check_writable(self.path)

    def read(self, questions: Sequence[Question]) -> list[Outcome]:
        """The outcomes of the first questions, which the file holds already.

        An incomplete last line, which a kill leaves, is cut off.

        Raises:
            UserError: The file holds other lines, or answers to other questions.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            os.truncate(self.path, sum(len(line) for line in lines[:-1]))
            del lines[-1]
        outcomes = [self._outcome(line, number) for number, line in enumerate(lines, start=1)]
        ids = [question.id for question in questions[: len(outcomes)]]
        if [outcome.id for outcome in outcomes] != ids:
            raise UserError(
                f"{self.path} holds {len(outcomes)} answers to other questions: delete it or name "
                "another file."
            )
        return outcomes

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Write the outcomes of a batch.

        Raises:
            UserError: The disk is full, or the file cannot be written for another reason.
        """
        lines = "".join(json.dumps(self._line(outcome)) + "\n" for outcome in outcomes)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): make room and run the same "
                "command again, which goes on from the answers so far."
            ) from error

    def _line(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "question_id": outcome.id,
            "prompt": outcome.question,
            "text": outcome.answer,
            "answer_id": f"{self.evaluation}-{outcome.id}",
            "model_id": self.model,
            "metadata": {
                "evaluation": self.evaluation,
                "kind": outcome.kind,
                "expected": outcome.expected,
                "blanked_text": outcome.blanked_answer,
                "images": outcome.images,
                "error": outcome.error,
            },
        }

    def _outcome(self, line: bytes, number: int) -> Outcome:
        try:
            value = json.loads(line)
            metadata = value["metadata"]
            if metadata["evaluation"] == self.evaluation:
                return Outcome(
                    value["question_id"],
                    metadata["kind"],
                    metadata["expected"],
                    value["text"],
                    metadata["blanked_text"],
                    value["prompt"],
                    tuple(metadata["images"]),
                    metadata["error"],
                )
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(
            f"{self.path}, line {number} is not of this evaluation (another checkpoint, other "
            "options, or another program wrote it): delete the file or name another."
        )


def check_writable(path: Path) -> None:
    """Make the directories of a file to write, and see that it can be written.

    Raises:
        UserError: It cannot.
    """
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): name another file."
        ) from error
