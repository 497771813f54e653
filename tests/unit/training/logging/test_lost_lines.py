"""Logs on a full disk: one sentence, whole lines, and no exception in the middle of a step."""

from __future__ import annotations

import errno
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.training.logging.jsonl import StepLines, append_line
from moiie_megatron.training.logging.scalars import Scalars
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import load_minimal


class _FullDisk(FileIO):
    """A file that takes so many more bytes."""

    room = 0

    def write(self, data: Any) -> int:
        count = super().write(data[: self.room])
        self.room -= count
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return count


def test_a_line_is_there_or_not(tmp_path: Path) -> None:
    told: list[str] = []
    lines = StepLines(tmp_path / "metrics.jsonl", 0, told.append)
    lines.add({"step": 1})
    lines.file.close()
    lines.file = disk = _FullDisk(tmp_path / "metrics.jsonl", "ab")
    for room, step in ((5, 2), (0, 3)):  # a part of the line fits, then nothing
        disk.room = room
        lines.add({"step": step})
    disk.room = 100
    lines.add({"step": 4})
    lines.close()
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [1, 4]
    assert len(told) == 2
    for sentence in told:
        assert str(tmp_path / "metrics.jsonl") in sentence and "No space left" in sentence


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.jsonl.writing"])
def test_a_log_that_cannot_be_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with user_error(tmp_path / "metrics.jsonl"):
        StepLines(tmp_path / "metrics.jsonl", 0)


def test_a_single_line_that_cannot_be_written(tmp_path: Path) -> None:
    told: list[str] = []
    append_line(tmp_path, {"step": 1}, told.append)
    (sentence,) = told
    assert str(tmp_path) in sentence and "Is a directory" in sentence


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    scalars = Scalars(load_minimal(tmp_path, [f"output={tmp_path}"]), 0, told.append)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    guarded: Any = scalars.board._get_file_writer().event_writer._async_writer._writer
    monkeypatch.setattr(guarded._writer, "write", full)
    scalars.add({"lm_loss": 1.0}, 1)
    scalars.board.flush()
    scalars.close()
    assert told and str(tmp_path / "tensorboard") in told[0] and "No space left" in told[0]
