"""What a process prints before it ends: a sentence, a traceback, or nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import torch.distributed as dist

from moiie_megatron.cli import launch
from moiie_megatron.cli.launch import exit_code
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.utils.errors import UserError
from tests.helpers.user_errors import assert_one_error

SINGLE = DistEnv()


def _mistake() -> None:
    raise UserError("train.steps is 0: use 1 or more.")


def _bug() -> None:
    list(zip([1], [1, 2], strict=True))


def test_a_task_that_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: None, SINGLE) == 0
    assert capsys.readouterr() == ("", "")


def test_a_mistake_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(_mistake, SINGLE) == 1
    assert capsys.readouterr() == ("", "error: train.steps is 0: use 1 or more.\n")


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is a ValueError, which UserError is as well."""
    assert exit_code(_bug, SINGLE) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):\n")
    assert f'{__file__}", line' in printed and ", in _bug" in printed
    assert printed.endswith("ValueError: zip() argument 2 is longer than argument 1\n")


@pytest.mark.parametrize("task", [_mistake, _bug])
def test_the_first_of_several_processes_prints(
    task: Callable[[], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(launch, "connect_store", lambda *_: store)
    printed = []
    for rank in (1, 0):
        assert exit_code(task, DistEnv(rank=rank, world_size=2)) == 1
        printed.append(capsys.readouterr().err)
    assert printed[0] and not printed[1]


def test_nobody_holds_the_store(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better twice than never."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for rank in (0, 1):
        assert exit_code(_mistake, DistEnv(rank=rank, world_size=2)) == 1
        assert capsys.readouterr().err.startswith("error: train.steps")


def test_a_launcher_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(UserError, match="MASTER_PORT.*torchrun"):
        launch.connect_store(DistEnv(rank=0, world_size=2))


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left on device"]),
        (PermissionError(errno.EACCES, "Permission denied", "/r/a.html.writing"), ["/r/a.html"]),
        (FileNotFoundError(errno.ENOENT, "No such file", "/none/losses.png"), ["/none/losses.png"]),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a.writing", None, "/r/a"), ["/r/a "]),
    ],
)
def test_a_file_that_cannot_be_used(
    error: OSError, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def task() -> None:
        raise error

    assert exit_code(task, SINGLE) == 1
    assert_one_error(capsys.readouterr().err, *parts)


def test_a_pipe_of_its_own_that_broke_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def task() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert exit_code(task, SINGLE) == 1
    assert capsys.readouterr().err.startswith("Traceback")
