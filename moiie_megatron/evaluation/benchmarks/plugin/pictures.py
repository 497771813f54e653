"""Pictures of a data set that cannot be decoded, so that one of them does not end a task."""

from __future__ import annotations

import functools
from typing import Any


class UndecodablePicture:
    """Stands for a picture; whatever is done with it raises the error of its decoding."""

    def __init__(self, error: Exception) -> None:
        self.__dict__["_error"] = error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy, pickle and others about any object
            raise AttributeError(name)
        raise self._error


def postpone_decoding_errors() -> None:
    """Make ``datasets`` return an ``UndecodablePicture`` where it would raise.

    lmms-eval decodes the first row when it makes a task, and rows before a model sees them.
    """
    from datasets import Image

    decode = Image.decode_example
    if hasattr(decode, "__wrapped__"):
        return

    @functools.wraps(decode)
    def decode_or_postpone(self: Any, value: Any, *args: Any, **options: Any) -> Any:
        try:
            return decode(self, value, *args, **options)
        except Exception as error:  # a damaged file can make PIL raise anything
            return UndecodablePicture(error)

    Image.decode_example = decode_or_postpone
