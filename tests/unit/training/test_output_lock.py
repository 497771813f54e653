"""A second run in an output directory is refused; what a killed run left behind is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.training import output_lock
from moiie_megatron.training.output_lock import LOCK_FILE, OutputLock, this_process
from moiie_megatron.utils.files import atomic_write
from tests.helpers.user_errors import user_error


@pytest.fixture
def other() -> Iterator[dict[str, Any]]:
    """A process of this machine that holds a lock, as its lock file describes it."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield this_process() | {"pid": process.pid, "ticks": output_lock._start(process.pid)}
        process.kill()


def write(folder: Path, holder: dict[str, Any]) -> None:
    with atomic_write(folder / LOCK_FILE) as file:
        file.write_text(json.dumps(holder))


def holder(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / LOCK_FILE).read_text()))


def test_it_is_there_while_the_run_is(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path / "new" / "run", beat=0.02)
    lock.acquire()
    first = holder(tmp_path / "new" / "run")
    assert first["pid"] == os.getpid() and first["host"]
    deadline = time.monotonic() + 5
    while holder(tmp_path / "new" / "run") == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_second_run_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    write(tmp_path, other)
    with user_error(tmp_path / LOCK_FILE, other["pid"], other["host"], other["since"], "remove"):
        OutputLock(tmp_path).acquire()
    assert holder(tmp_path) == other


@pytest.mark.parametrize(
    "changes",
    [{"ticks": 1}, {"pid": 2**22 - 1}],
    ids=["another process of that number", "no process"],
)
def test_a_killed_run(changes: dict[str, int], tmp_path: Path, other: dict[str, Any]) -> None:
    write(tmp_path, other | changes)
    lock = OutputLock(tmp_path)
    lock.acquire()
    assert holder(tmp_path)["pid"] == os.getpid()
    lock.release()


def test_a_run_on_another_machine(tmp_path: Path, other: dict[str, Any]) -> None:
    """It is there if its file changes."""
    far = other | {"machine": "far", "host": "node7", "alive": 0}
    write(tmp_path, far)
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.02):
            write(tmp_path, far | {"alive": time.time()})

    thread = threading.Thread(target=live)
    thread.start()
    with user_error("node7", other["pid"]):
        OutputLock(tmp_path, beat=0.05, watch=5).acquire()
    over.set()
    thread.join()

    lock = OutputLock(tmp_path, beat=0.05, watch=0.2)
    lock.acquire()
    assert holder(tmp_path)["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_broken_file(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    lock = OutputLock(tmp_path, beat=0.05, watch=0.1)
    lock.acquire()
    lock.release()


def test_a_lock_that_was_removed_is_not_given_back(tmp_path: Path, other: dict[str, Any]) -> None:
    lock = OutputLock(tmp_path)
    lock.acquire()
    write(tmp_path, other)
    lock.release()
    assert holder(tmp_path) == other


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    lock = OutputLock(tmp_path)
    lock.acquire()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    lock.release()


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with user_error("output is", tmp_path / "file"):
        OutputLock(tmp_path / "file").acquire()
