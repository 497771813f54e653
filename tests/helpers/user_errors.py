"""What a user error must say: the key or file, the value and the remedy, not the exact sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moiie_megatron.utils.errors import UserError
from tests.helpers.launch import Finished


@contextmanager
def user_error(*parts: object) -> Iterator[None]:
    """The block must raise a ``UserError`` of one line that names every part.

    Args:
        parts: What the message must hold, in any order: keys, values, file names.
    """
    with pytest.raises(UserError) as caught:
        yield
    _check(str(caught.value), parts)


def assert_user_error(finished: Finished, *parts: object, code: int = 1) -> None:
    """A command must have ended with one ``error: ...`` line that names every part."""
    assert finished.code == code, f"exit code {finished.code}\n{finished.stderr[-4000:]}"
    assert_one_error(finished.stderr, *parts)


def assert_one_error(text: str, *parts: object) -> None:
    """What one or several processes have printed must hold one ``error: ...`` line, with every
    part in it, and no traceback."""
    assert "Traceback" not in text, text[-4000:]
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text[-4000:]
    _check(lines[0].removeprefix("error: "), parts)


def _check(message: str, parts: tuple[object, ...]) -> None:
    assert parts, "name at least the key or the file"
    assert message.strip() and "\n" not in message.strip(), message
    missing = [str(part) for part in parts if not _holds(message, str(part))]
    assert not missing, f"{missing} not in: {message}"


def _holds(message: str, part: str) -> bool:
    if re.fullmatch(r"[-\d.]+", part):  # a number, not the digits of another one
        return re.search(rf"(?<![\d.]){re.escape(part)}(?!\.?\d)", message) is not None
    return part in message
