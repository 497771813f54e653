"""Training processes that wait where a test wants them, until it lets them go on or kills them.

The processes and the test meet in a directory: ``paused-ATTEMPT-RANK`` says that a rank waits,
``signalled-RANK`` that it has got a signal while it waited, ``go`` and ``go-ATTEMPT`` end the
waiting.  ``ATTEMPT`` counts torchrun's restarts.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tests.helpers.ranks import wait_until

_EVERY = 0.005  # seconds between two looks
_AT_MOST = 300  # seconds


@dataclass(frozen=True)
class Pause:
    """The test's side.

    Attributes:
        directory: Where processes and test meet; made here.
    """

    directory: Path

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)

    def before_step(self, number: int) -> str:
        """The hook for ranks that wait before their ``number``-th step since they were started.

        All steps before have been logged, and their checkpoints written (in the background: begun).
        """
        return f"{__name__}:pause_before_step,{self.directory},{number}"

    def in_save(self) -> str:
        """The hook for ranks whose writers wait in the middle of a file of their first save."""
        return f"{__name__}:pause_in_save,{self.directory}"

    def wait(self, ranks: int, text: Callable[[], str], attempt: int = 0) -> None:
        """Until so many ranks (or at least one writer of each of them) wait.

        Args:
            text: What the processes have printed, for the message when they never wait.
        """
        files = [self.directory / f"paused-{attempt}-{rank}" for rank in range(ranks)]
        wait_until(lambda: all(file.exists() for file in files), text)

    def wait_for_signal(self, rank: int, text: Callable[[], str]) -> None:
        """Until a waiting rank has got a signal."""
        wait_until((self.directory / f"signalled-{rank}").exists, text)

    def release(self, attempt: int | None = None) -> None:
        """Let those go on that were started in ``attempt``; None: all, and nobody waits again."""
        (self.directory / ("go" if attempt is None else f"go-{attempt}")).touch()


def pause_before_step(rank: int, directory: str, number: str) -> None:
    """The hook of ``Pause.before_step``."""
    from moiie_megatron.training import step

    original, calls = step.count_tokens, 0  # what a step calls first, once

    def count_tokens(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(number):
            _wait(rank, Path(directory))
        return original(*args)

    step.count_tokens = count_tokens


def pause_in_save(rank: int, directory: str) -> None:
    """The hook of ``Pause.in_save``; writers are forks and inherit it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original, calls = filesystem_async._write_item, 0

    @functools.wraps(original)  # Megatron looks at its parameters
    def write_item(transforms: Any, stream: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        result = original(transforms, stream, *args, **options)
        calls += 1
        if calls == 3:
            stream.flush()  # what lies in the file is half of what shall
            _wait(rank, Path(directory))
        return result

    filesystem_async._write_item = write_item


def _wait(rank: int, directory: Path) -> None:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        (directory / f"signalled-{rank}").touch()
        before[number](number, frame)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        if callable(signal.getsignal(number)):
            before[number] = signal.signal(number, note)
    (directory / f"paused-{attempt}-{rank}").touch()
    deadline = time.monotonic() + _AT_MOST
    while not any((directory / name).exists() for name in ("go", f"go-{attempt}")):
        if time.monotonic() > deadline:  # the test is gone
            os._exit(1)
        time.sleep(_EVERY)
    for number, handler in before.items():
        signal.signal(number, handler)
