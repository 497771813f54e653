"""What conversions write: checked against the file, complete or not at all, in bounded memory."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from moiie_megatron.convert import conversion_report
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.convert.dcp.writer import CheckpointWriter
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.hf.weights_source import WeightsSource
from moiie_megatron.convert.upcycle import upcycle_checkpoint
from moiie_megatron.utils.errors import UserError
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.user_errors import user_error


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision(tmp_path_factory.mktemp("vision"))


def test_an_error_in_the_middle_leaves_nothing(
    llm: Path, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(CheckpointWriter, "write_expert", full)
    with user_error("No space left"):
        upcycle_checkpoint(llm, vision, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_reads_back_wrong_is_noticed(
    llm: Path, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report's claims are about the file: an expert that was written wrong is no copy."""
    real = CheckpointWriter.write_expert

    def spoilt(self, name, data, expert, num_experts):
        place = real(self, name, data, expert, num_experts)
        if expert == 2:
            with place.file.open("r+b") as stream:
                stream.seek(place.find().values.offset)
                stream.write(b"\x01\x02")
        return place

    monkeypatch.setattr(CheckpointWriter, "write_expert", spoilt)
    with pytest.raises(UserError, match="does not hold what was written to it"):
        upcycle_checkpoint(llm, vision, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_defect_in_the_thread_that_reads_back(
    llm: Path, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It surfaces with its own traceback and leaves nothing."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(conversion_report, "_entry", broken)
    with pytest.raises(ZeroDivisionError, match="a defect") as caught:
        upcycle_checkpoint(llm, vision, tmp_path / "out")
    assert caught.traceback[-1].name == "broken"
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_be_hashed(
    llm: Path, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(file: Path, algorithm: str) -> str:
        raise UserError(f"{file} cannot be read ({algorithm}): copy it again.")

    monkeypatch.setattr(conversion_report, "file_digest", unreadable)
    with pytest.raises(UserError, match=r"model.safetensors cannot be read \(xxh3_128\)"):
        upcycle_checkpoint(llm, vision, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_cut_off_meanwhile(llm: Path, vision: Path, tmp_path: Path) -> None:
    """After its header was read: no crash of the process, as a mapped file would give."""
    copied = tmp_path / "llm"
    shutil.copytree(llm, copied)
    file, out = copied / "model.safetensors", tmp_path / "out"

    def cut(*_: int) -> None:
        file.write_bytes(file.read_bytes()[:-3000])

    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"{file} is cut off"):
        upcycle_checkpoint(copied, vision, out, progress=cut)
    assert sorted(tmp_path.iterdir()) == before


def test_memory_does_not_grow_with_the_tensors(
    llm: Path, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights go through in blocks: none of those that a source holds is ever read whole."""

    def whole(*_: object) -> None:
        raise AssertionError("a whole tensor is read")

    monkeypatch.setattr(WeightsSource, "get", whole)
    out = upcycle_checkpoint(llm, vision, tmp_path / "out")
    monkeypatch.setattr(CheckpointReader, "get", whole)
    export_checkpoint(out, tmp_path / "exported")


def test_one_and_more_threads_write_the_same(
    llm: Path, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading back in the thread that writes gives the same report as beside it."""

    class Inline(ThreadPoolExecutor):
        def submit(self, task, *arguments):  # type: ignore[override]
            future: Future = Future()
            future.set_result(task(*arguments))
            return future

    upcycle_checkpoint(llm, vision, tmp_path / "a")
    monkeypatch.setattr(conversion_report, "ThreadPoolExecutor", Inline)
    upcycle_checkpoint(llm, vision, tmp_path / "b")
    reports = [
        json.loads((tmp_path / name / "conversion_report.json").read_text()) for name in "ab"
    ]
    assert reports[0] == reports[1]
