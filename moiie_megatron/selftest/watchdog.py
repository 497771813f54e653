"""Ends a self-test that is stuck, from a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_POLL: Final = 0.5  # seconds
GRACE: Final = 20.0  # seconds for the other ranks once a rank has left a check with an error


class Watchdog:
    """Calls ``expired`` when the block of ``limit`` lasts too long.

    The main thread may wait inside a collective for ever; such calls let other threads run.

    Args:
        expired: Called once with the name of the check that is stuck and why it was given up; it
            must not return.
        any_error: Whether a rank has left the named check with an error, which shortens the time.
    """

    def __init__(
        self, expired: Callable[[str, str], None], any_error: Callable[[str], bool]
    ) -> None:
        self._expired = expired
        self._any_error = any_error
        self._lock = threading.Lock()
        self._check: str | None = None
        self._deadline = self._limit = 0.0
        self._thread = threading.Thread(target=self._watch, name="selftest", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @contextmanager
    def limit(self, check: str, seconds: float) -> Iterator[None]:
        """Give up the named check if the block lasts longer than ``seconds``."""
        with self._lock:
            self._check, self._limit = check, seconds
            self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            with self._lock:
                self._check = None

    def _watch(self) -> None:
        error_seen: dict[str, float] = {}
        while True:
            time.sleep(_POLL)
            with self._lock:
                check, deadline, limit = self._check, self._deadline, self._limit
            if check is None:
                continue
            now = time.monotonic()
            if self._any_error(check):
                error_seen.setdefault(check, now)
            after_error = now - error_seen.get(check, now) > GRACE
            if now < deadline and not after_error:
                continue
            with self._lock:
                if self._check != check:  # it has just ended
                    continue
                why = f"not over after {limit:.0f} s"
                if after_error:
                    why = f"not over {GRACE:.0f} s after a rank left it with an error"
                self._expired(check, why)
