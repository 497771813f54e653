"""Directories that appear complete or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from moiie_megatron.utils.directories import new_directory
from tests.helpers.user_errors import user_error


def _write(final: Path, content: str, force: bool = False) -> None:
    with new_directory(final, num_bytes=1, force=force, marker="mark") as directory:
        (directory / "mark").write_text(content)
        assert not (final / "mark").exists() or (final / "mark").read_text() != content


def test_the_name_comes_last(tmp_path: Path) -> None:
    _write(tmp_path / "below" / "out", "one")
    assert [p.name for p in (tmp_path / "below").iterdir()] == ["out"]
    assert (tmp_path / "below" / "out" / "mark").read_text() == "one"


def test_an_existing_directory_needs_force(tmp_path: Path) -> None:
    _write(tmp_path / "out", "one")
    with user_error(tmp_path / "out", "--force"):
        _write(tmp_path / "out", "two")
    assert (tmp_path / "out" / "mark").read_text() == "one"
    _write(tmp_path / "out", "two", force=True)
    assert (tmp_path / "out" / "mark").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_does_not_replace_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _write(tmp_path / "out", "an empty directory is no loss")
    (tmp_path / "out" / "mark").rename(tmp_path / "out" / "thesis.tex")
    with user_error(tmp_path / "out", "mark", "--force"):
        _write(tmp_path / "out", "two", force=True)
    (tmp_path / "file").touch()
    with user_error(tmp_path / "file", "mark"):
        _write(tmp_path / "file", "two", force=True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    _write(tmp_path / "out", "one")
    with (
        pytest.raises(error),
        new_directory(tmp_path / "out", num_bytes=1, force=True, marker="mark") as directory,
    ):
        (directory / "half").touch()
        raise error
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mark"]


def test_what_a_kill_left_is_swept_up(tmp_path: Path) -> None:
    left = tmp_path / "out.writing"
    left.mkdir()
    (left / "half").touch()
    _write(tmp_path / "out", "one")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mark", "out"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000_000))
    _write(tmp_path / "out", "fits")
    with (
        user_error(tmp_path / "other", "2.07 GB", "2.00 GB"),
        new_directory(tmp_path / "other", num_bytes=2_000_000_000, force=False, marker="mark"),
    ):
        raise AssertionError("it must not come to this")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
