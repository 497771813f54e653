"""Reasons to end a run early."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.training.stop import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nobody_asks() -> None:
    stop = StopRequest()
    assert stop.flags(None) == stop.flags(60.0) == [0.0, 0.0, 0.0]
    stop.resolve([0.0, 0.0, 0.0], None)
    assert stop.reason is None


@pytest.mark.parametrize(
    ("number", "flags"), [(signal.SIGTERM, [1.0, 0.0, 0.0]), (signal.SIGUSR1, [0.0, 1.0, 0.0])]
)
def test_a_signal(number: signal.Signals, flags: list[float]) -> None:
    stop = StopRequest()
    stop.listen()
    for _ in range(2):  # launchers send it again
        os.kill(os.getpid(), number)
    assert stop.flags(None) == flags
    assert stop.reason is None  # until all ranks know
    stop.resolve(flags, None)
    assert stop.reason == f"signal {number.name}"


def test_another_rank_was_asked() -> None:
    stop = StopRequest()
    stop.resolve([0.0, 2.0, 0.0], None)
    assert stop.reason == "signal SIGUSR1"


def test_time_is_over() -> None:
    stop = StopRequest()
    flags = stop.flags(1e-9)
    assert flags == [0.0, 0.0, 1.0]
    stop.resolve(flags, 1e-9)
    assert stop.reason == "train.exit_after_minutes 1e-09"


def test_attempts_are_counted_where_torchrun_keeps_its_store() -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "3"}
    assert dist_env_from(environ).attempt == 0
    assert dist_env_from(environ | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).attempt == 0
    assert dist_env_from(environ | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).attempt == 3
