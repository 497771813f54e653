"""Checkpoints appear whole, old ones go, and a damaged one is passed over by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiie_megatron.checkpoint.finalize import finalize, unfinished_directory
from moiie_megatron.checkpoint.find_latest import newest_whole
from moiie_megatron.checkpoint.manifest import MANIFEST_FILE, damage, write_manifest


def _save(run: Path, step: int, keep: int = 3) -> Path:
    """A checkpoint of a few bytes, saved as a run does."""
    final = run / "checkpoints" / f"step_{step:07d}"
    beside = unfinished_directory(final)
    beside.mkdir(parents=True)
    for name in (".metadata", "metadata.json", "common.pt", "__0_0.distcp", "run.yaml"):
        (beside / name).write_text(f"{name} of {step}")
    finalize(final, keep=keep)
    return final


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) == (None, [])


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    folders = [_save(tmp_path, step, keep=2) for step in (5, 10, 15)]
    assert _names(tmp_path) == ["latest", "step_0000010", "step_0000015"]
    assert newest_whole(tmp_path) == (folders[-1], [])
    assert [damage(folder) for folder in folders] == ["the folder is not there", None, None]


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    for name in ("step_0000010.writing", "step_0000002.removing"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert newest_whole(tmp_path)[0] == tmp_path / "checkpoints" / "step_0000005"
    _save(tmp_path, 15)
    assert _names(tmp_path) == ["latest", "step_0000005", "step_0000015"]


def test_a_step_is_saved_again(tmp_path: Path) -> None:
    """After a start from an earlier checkpoint; later steps do not count as kept ones."""
    _save(tmp_path, 5)
    (_save(tmp_path, 10) / "common.pt").write_text("torn")
    for step in (6, 7):
        _save(tmp_path, step, keep=2)
    assert _names(tmp_path) == ["latest", "step_0000006", "step_0000007", "step_0000010"]
    assert newest_whole(tmp_path) == (tmp_path / "checkpoints" / "step_0000007", [])
    again = _save(tmp_path, 10, keep=2)
    assert damage(again) is None
    assert _names(tmp_path) == ["latest", "step_0000007", "step_0000010"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("__0_0.distcp", None, "__0_0.distcp is missing"),
        (".metadata", None, ".metadata is missing"),
        ("common.pt", "common.pt of", "common.pt has 12 bytes instead of 15"),
        ("metadata.json", "metadata.json 0f 10", "metadata.json is not what was written"),
        (MANIFEST_FILE, "{", f"{MANIFEST_FILE} cannot be read (Expecting property name"),
        (MANIFEST_FILE, "[]", f"{MANIFEST_FILE} cannot be read (list indices must"),
    ],
)
def test_damage(tmp_path: Path, name: str, content: str | None, what: str) -> None:
    before = _save(tmp_path, 5)
    newest = _save(tmp_path, 10)
    if content is None:
        (newest / name).unlink()
    else:
        (newest / name).write_text(content)

    found, notes = newest_whole(tmp_path)

    assert found == before
    assert len(notes) == 1 and notes[0].startswith(f"The checkpoint {newest} is damaged: {what}")


def test_files_that_no_run_needs_may_change(tmp_path: Path) -> None:
    newest = _save(tmp_path, 5)
    (newest / "run.yaml").write_text("another")
    (newest / "notes.txt").touch()
    assert damage(newest) is None


def test_a_checkpoint_without_a_list(tmp_path: Path) -> None:
    """As older programs wrote it."""
    newest = _save(tmp_path, 5)
    (newest / MANIFEST_FILE).unlink()
    assert newest_whole(tmp_path) == (newest, [])
    (newest / "metadata.json").unlink()
    assert damage(newest) == "metadata.json is missing"


@pytest.mark.parametrize("text", ["step_0000012\n", "", "step_12"])
def test_a_pointer_to_nothing(tmp_path: Path, text: str) -> None:
    newest = _save(tmp_path, 5)
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.write_text(text)
    found, (note,) = newest_whole(tmp_path)
    assert found == newest
    assert str(pointer) in note


def test_a_run_that_was_taken_back(tmp_path: Path) -> None:
    first = _save(tmp_path, 5)
    _save(tmp_path, 10)
    (tmp_path / "checkpoints" / "latest").write_text("step_0000005\n")
    assert newest_whole(tmp_path) == (first, [])


def test_nothing_but_damaged_ones(tmp_path: Path) -> None:
    for step in (5, 10):
        (_save(tmp_path, step) / "common.pt").unlink()
    with pytest.raises(ValueError) as caught:
        newest_whole(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"No checkpoint in {tmp_path}/checkpoints can be used (")
    assert message.count("common.pt is missing") == 2


def test_large_files_are_known_by_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moiie_megatron.checkpoint.manifest._DIGEST_UP_TO", 3)
    folder = _save(tmp_path, 5)
    assert "sha256" not in json.loads((folder / MANIFEST_FILE).read_text())["files"]["common.pt"]
    (folder / "common.pt").write_text("common.pt 0f 5")
    assert damage(folder) is None
    write_manifest(folder)
    (folder / "common.pt").write_text("common.pt of")
    assert damage(folder) == "common.pt has 12 bytes instead of 14"
