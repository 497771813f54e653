"""Programs end in one line on a signal, leave nothing half-written, and mind a lost output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, Finished, is_running
from tests.helpers.ranks import wait_until
from tests.helpers.user_errors import assert_user_error

START = """
import ctypes, os, sys, time
from functools import partial
from pathlib import Path
from moiie_megatron.cli.program import run_program
from moiie_megatron.utils.directories import new_directory
from moiie_megatron.utils.files import atomic_write
from moiie_megatron.utils.signals import SignalWatch

def wait_in_c():
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, bytes(64)
    print("ready", flush=True)
    lock(mutex)
    lock(mutex)  # never returns, whatever the signal

"""
WRITES = """
def main():
    with (
        new_directory(Path(sys.argv[1], "model"), num_bytes=1, force=False, marker="x") as model,
        atomic_write(Path(sys.argv[1], "file")) as file,
    ):
        (model / "weights").write_bytes(bytes(1000))
        file.write_bytes(bytes(1000))
        print("ready", flush=True)
        time.sleep(60)
run_program(main)
"""
STUCK = """
run_program(wait_in_c, SignalWatch(grace=0.2))
"""
STUCK_IN_THE_END = """
def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        wait_in_c()
run_program(main)
"""
FORKS = """
def main():
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
run_program(main)
"""
NOTES = """
import signal
def main(watch):
    noted = []
    watch.call([signal.SIGTERM], noted.append)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    while not noted:
        time.sleep(0.05)
    time.sleep(1)
watch = SignalWatch(grace=0.2)
run_program(partial(main, watch), watch)
"""
PRINTS = """
def main():
    for number in range(100_000):
        print(number)
run_program(main)
"""


@contextmanager
def program(text: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A running program that has printed its first line."""
    command = [sys.executable, "-c", START + text, *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            process.first = process.stdout.readline().strip()  # type: ignore[attr-defined]
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with program(WRITES, tmp_path) as process:
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (128 + number, "", f"Stopped by {number.name}.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_waits_inside_a_library() -> None:
    with program(STUCK) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (143, "", "Stopped by SIGTERM.\n")


def test_a_second_interrupt_ends_at_once() -> None:
    with program(STUCK_IN_THE_END) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=3)
    assert (process.returncode, out, err) == (130, "", "Stopped by SIGINT.\n")


def test_a_fork_ends_with_the_program() -> None:
    """It does not listen to a Ctrl-C of its own, which would be a second message."""
    with program(FORKS) as process:
        child = int(process.first)  # type: ignore[attr-defined]
        os.kill(child, signal.SIGINT)
        time.sleep(0.1)
        assert is_running(child)
        process.kill()
        wait_until(lambda: not is_running(child), lambda: "the fork lives", timeout=5)


def test_a_fork_outlives_a_signal_that_the_program_notes() -> None:
    """As writers of checkpoints must, when a whole process group is told to stop."""
    with program(NOTES) as process:
        child = int(process.first)  # type: ignore[attr-defined]
        os.kill(child, signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert is_running(child) and process.poll() is None
        assert process.wait(20) == 0
    wait_until(lambda: not is_running(child), lambda: "the fork lives", timeout=5)


def test_a_reader_that_has_enough() -> None:
    with program(PRINTS) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(20) == 128 + signal.SIGPIPE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_behind_standard_output() -> None:
    with open("/dev/full", "w") as full:
        finished = subprocess.run(
            [sys.executable, "-c", START + PRINTS],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert_user_error(
        Finished(finished.returncode, "", finished.stderr), "output", "No space left on device"
    )
