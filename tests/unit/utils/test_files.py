"""Files that appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiie_megatron.utils.files import atomic_write


def test_nothing_is_left_of_a_file_that_cannot_get_its_name(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "out") as beside:
        beside.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_file_is_kept_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "out") as beside:
        beside.write_text("new")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "old")]
