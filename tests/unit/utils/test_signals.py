"""Signals that are ignored when a program starts."""

from __future__ import annotations

import os
import signal

import pytest

from moiie_megatron.utils.signals import SignalWatch, Stopped


def test_signals_that_are_ignored_from_the_start() -> None:
    """A script that passes SIGUSR1 on ignores it itself, and what it starts inherits that."""
    numbers = (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    noted: list[int] = []
    try:
        with SignalWatch() as watch:
            watch.call([signal.SIGUSR1], noted.append)
            for number in numbers:
                os.kill(os.getpid(), number)
        assert noted == [signal.SIGUSR1]
        with pytest.raises(Stopped) as stopped, SignalWatch([signal.SIGUSR1]):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stopped.value.number is signal.SIGUSR1
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
