"""The conversion tool: its subcommands, its errors, and what a kill leaves behind."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.convert.dcp.writer import CheckpointWriter, Place
from tests.helpers.launch import ROOT, TRAIN, Finished, command, run
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.user_errors import assert_user_error

TOOL = "tools/convert.py"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sources")
    write_language(folder / "llm", dtype=torch.float32)
    write_vision(folder / "vision", dtype=torch.float32)
    return ["--llm", str(folder / "llm"), "--vision", str(folder / "vision")]


@dataclass(frozen=True)
class _Convert:
    """The tool inside this process: what it imports takes seconds."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str | Path) -> Finished:
        self.monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(ROOT / TOOL), run_name="__main__")
        captured = self.capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        return Finished(leaving.value.code, captured.out, captured.err)


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> _Convert:
    return _Convert(monkeypatch, capsys)


def test_upcycle_inspect_export(sources: list[str], convert: _Convert, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    words = ["upcycle", *sources, "--out", checkpoint, "--experts", "2,4,2", "--layers", "1,2"]
    assert str(checkpoint) in convert(*words, "--perturb", "0.01").check().stdout
    found = json.loads(convert("inspect", checkpoint, "--json").check().stdout)
    assert found["moe_layers"] == [1, 2] and found["variant"] == "moiie"
    assert found["experts"][1:3] == ["vision.1", "shared.0"] and len(found["experts"]) == 8
    # per layer and expert 3 matrices of 32 x 48; per layer two routers over 6 experts
    assert found["parts"]["experts"]["parameters"] == 2 * 8 * 3 * 32 * 48
    assert found["parts"]["routers"]["parameters"] == 2 * 2 * 6 * 32
    assert found["parts"]["language"]["dtypes"] == ["float32"]
    assert found["conversion"]["experts"] == 16 and found["conversion"]["equal_experts"] == 0
    text = convert("inspect", checkpoint).check().stdout
    assert "experts that equal the dense FFN: 0 of 16" in text and "shared.3" in text
    convert("export", "--ckpt", checkpoint, "--out", out).check()
    assert (out / "model.safetensors").is_file() and (out / "modeling_moiie.py").is_file()


def test_errors_are_one_sentence(sources: list[str], convert: _Convert, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    fine = ["upcycle", *sources, "--out", str(tmp_path / "out")]
    cases = [
        ([*fine, "--experts", "1,2"], ("--experts", "'1,2'", "1,2,1")),
        ([*fine, "--layers", "even"], ("--layers", "'even'", "interleaved")),
        ([*fine, "--top-k", "9"], ("moe.top_k", "9")),
        (["upcycle", *sources, "--out", str(tmp_path / "full")], (tmp_path / "full", "exists")),
        (
            ["export", "--ckpt", str(tmp_path), "--out", str(tmp_path / "out")],
            (tmp_path, "no checkpoint"),
        ),
        (["inspect", str(tmp_path / "none")], (tmp_path / "none", "no checkpoint")),
    ]
    for words, parts in cases:
        assert_user_error(convert(*words), *parts)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


@pytest.mark.slow
def test_training_starts_from_a_converted_checkpoint(
    convert: _Convert, digits: Path, tmp_path: Path
) -> None:
    """From its own run.yaml; what the run saves is exported with the tokenizer it came with."""
    llm = write_language(tmp_path / "llm", vocab_size=512, max_position_embeddings=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llm / name).unlink()
    shutil.copy(digits / "data" / "tokenizer.model", llm)
    vision = write_vision(tmp_path / "vision")
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "run"
    convert("upcycle", "--llm", llm, "--vision", vision, "--out", checkpoint).check()
    data = f"[{{records: {digits}/data/train.jsonl, images: {digits}/data/images}}]"
    overrides = [
        *(f"output={output}", f"data.sources={data}", "data.num_workers=0"),
        *("train.epochs=null", "train.steps=1", "train.global_batch_size=4", "train.device=cpu"),
    ]
    run(command(TRAIN, [checkpoint / "run.yaml", *overrides]), timeout=120).check()
    convert("export", "--ckpt", output, "--out", tmp_path / "out").check()
    before = convert("inspect", checkpoint, "--json").check().stdout
    after = convert("inspect", output, "--json").check().stdout
    assert json.loads(after)["step"] == 1
    for part in ("language", "experts", "routers", "vision", "connector"):
        old, new = (json.loads(text)["parts"][part] for text in (before, after))
        assert new["parameters"] == old["parameters"]
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) > 100


@pytest.mark.slow
def test_no_process_group_and_no_megatron() -> None:
    """A machine without Megatron-Core's dependencies converts, too."""
    program = (
        "import sys\n"
        "import moiie_megatron.convert.upcycle, moiie_megatron.convert.export\n"
        "import moiie_megatron.convert.inspect_checkpoint, moiie_megatron.cli.launch\n"
        "sys.exit('megatron' in sys.modules)"
    )
    run([sys.executable, "-c", program], timeout=60).check()


def _slowly(convert: _Convert, *words: str | Path) -> None:
    """A conversion that takes seconds on any disk."""
    write = CheckpointWriter._write

    def wait_then_write(*arguments: Any) -> Place:
        time.sleep(0.05)
        return write(*arguments)

    CheckpointWriter._write = wait_then_write  # type: ignore[method-assign]
    torch.set_num_threads(1)  # a fork does not have the threads that the parent's torch counts on
    convert(*words)


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_looks_finished(
    convert: _Convert, tmp_path: Path
) -> None:
    """Killed while it writes; the next attempt is not disturbed by what is left."""
    llm = write_language(tmp_path / "llm", hidden_size=256, intermediate_size=4096)
    vision = write_vision(tmp_path / "vision")
    out, beside = tmp_path / "out", tmp_path / "out.writing"
    words = ["upcycle", "--llm", llm, "--vision", vision, "--out", out, "--layers", "all"]
    # A fork, which has the imports already.
    process = multiprocessing.get_context("fork").Process(
        target=_slowly, args=(convert, *words, "--perturb", "1"), daemon=True
    )
    process.start()
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 1 << 20 for file in beside.glob("*.distcp")):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists() and not (beside / "metadata.json").exists()
    for left in (out, beside):
        assert_user_error(convert("inspect", left), left)
    convert(*words).check()
    assert out.is_dir() and not beside.exists()


@pytest.mark.slow
def test_the_benchmark(tmp_path: Path) -> None:
    sizes = {"layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "groups": 2, "vocab": 512}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    words += ["--rounds", "1", "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    run(command("benchmarks/convert.py", words), timeout=120).check()
    report = json.loads((tmp_path / "out.json").read_text())
    assert 0.1 < report["peak_rss_gb"] < 2
    assert report["upcycle_over_cp"] > 0 and report["export_over_cp"] > 0
    # bf16: embedding and head, per layer attention (q, k, v, o), one dense FFN and four experts
    parameters = 2 * 512 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32) + 5 * 3 * 64 * 128
    assert report["gb_written"] * 1e9 > 2 * parameters
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
