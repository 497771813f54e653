"""Seeded damage of files, and a limit on the time that reading one may take."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from types import FrameType
from typing import Final

# Lengths, offsets and characters at which readers make mistakes.
_WORDS: Final = (
    b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0",
    b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\1", b"\1\0", b"\n", b'"', b"\\", b"[", b"{", b"}",
    b"\xef\xbb\xbf", b"\xed\xa0\x80", b"1e999",
)  # fmt: skip


def damaged(content: bytes, random: Random, first: int = 0, last: int | None = None) -> bytes:
    """A copy of ``content`` with 1 to 8 changes between the bytes ``first`` and ``last``.

    A change is a flipped bit, a byte, one of ``_WORDS`` over the bytes there or between them, a
    part that is missing or comes twice, or, where the end is not fixed, the end that is missing.
    """
    data = bytearray(content)
    end = len(data) if last is None else last
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        at = random.randrange(first, max(first + 1, min(end, len(data))))
        match random.randrange(7 if last is None else 3):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << random.randrange(8)
            case 1:
                data[at : at + 1] = random.randbytes(1)
            case 2:
                word = random.choice(_WORDS)[: end - at]
                data[at : at + len(word)] = word
            case 3:
                data[at:at] = random.choice(_WORDS)
            case 4:
                del data[at : at + random.randrange(1, 40)]
            case 5:
                data[at:at] = data[at : at + random.randrange(1, 200)]
            case 6:
                del data[at:]
    return bytes(data)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``AssertionError`` in the block after ``seconds``."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
