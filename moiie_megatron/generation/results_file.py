"""A file of results, one JSON object per line, which appears when it is complete.

Until then the lines are in a file beside it, from which the same command goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import write_output

_PROGRESS = ".progress"
_HEADER = "generation"  # key of the first line of the file beside: whose results they are


class ResultsFile:
    """The results of one generation.

    Args:
        path: Where they are in the end; its directory is made.
        identity: Digest of all that the results depend on.

    Raises:
        UserError: ``path`` exists, or cannot be written.
    """

    def __init__(self, path: str | Path, identity: str) -> None:
        self.path = Path(path)
        self._beside = self.path.with_name(self.path.name + _PROGRESS)
        self._header = json.dumps({_HEADER: identity}) + "\n"
        if self.path.exists():
            raise UserError(f"--out is {path}, which exists: delete it or name another file.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._beside.open("a", encoding="utf-8") as file:
                if file.tell() == 0:
                    file.write(self._header)
        except OSError as error:
            raise self._unwritable(error) from error

    def count(self) -> int:
        """How many results an interrupted generation has left; a line cut short is removed.

        Raises:
            UserError: They are of another generation.
        """
        lines = self._beside.read_bytes().splitlines(keepends=True)
        if not lines[0].endswith(b"\n") or lines[0] != self._header.encode():
            raise UserError(
                f"{self._beside} holds results with other options, records or weights: delete it "
                "or name another --out."
            )
        if not lines[-1].endswith(b"\n"):
            os.truncate(self._beside, sum(len(line) for line in lines[:-1]))
            del lines[-1]
        return len(lines) - 1

    def append(self, results: Sequence[dict[str, Any]]) -> None:
        """Write the results of a batch.

        Raises:
            UserError: They cannot be written.
        """
        lines = "".join(json.dumps(result) + "\n" for result in results)
        try:
            with self._beside.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self) -> list[dict[str, Any]]:
        """Put the results where they belong, and return them.

        Raises:
            UserError: They cannot be written.
        """
        _, *lines = self._beside.read_text(encoding="utf-8").splitlines(keepends=True)
        with write_output(self.path) as file:
            file.write_text("".join(lines), encoding="utf-8")
        self._beside.unlink()
        return [json.loads(line) for line in lines]

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} cannot be written ({error.strerror or error}): make room there or name "
            "another file; the same command goes on from what is written."
        )
