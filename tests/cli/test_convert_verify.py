"""``convert.py verify`` and ``convert.py reshard`` as a user calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.upcycle import upcycle_checkpoint
from tests.helpers.launch import Finished, command, run
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.user_errors import assert_user_error

TOOL = "tools/convert.py"


@pytest.fixture(autouse=True)
def _code_of_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    llm, vision = write_language(folder / "llm"), write_vision(folder / "vision")
    export_checkpoint(upcycle_checkpoint(llm, vision, folder / "checkpoint"), folder / "export")
    return folder


def _convert(*arguments: str | Path) -> Finished:
    return run(command(TOOL, list(arguments)), timeout=200)


@pytest.mark.slow
def test_reshard_and_verify(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    degrees = ["--tp", "2", "--pp", "2", "--vpp", "2", "--ep", "2"]
    text = _convert("reshard", models / "checkpoint", *degrees, "--out", out).check().stdout
    assert "cut for TP 2, PP 2, VPP 2, EP 2, expert TP 1" in text and "Never required" in text
    finished = _convert("verify", out, models / "export").check()
    lines = finished.stdout.splitlines()
    assert lines[0].startswith(f"A  {out}: Megatron checkpoint, llama, with siglip, experts v")
    assert lines[1].startswith(f"B  {models / 'export'}: Hugging Face directory")
    assert lines[2] == "tensors: 84 compared, 84 equal"
    assert lines[3].startswith("logits, text: 64 positions, |difference| mean ")
    assert lines[4].startswith("logits, image + text: 36 positions")
    assert lines[5:] == ["SAME: tensors equal, logits within 0.0001"]
    # Rounding alone tells transformers' sums from ours.
    finished = _convert("verify", models / "llm", out, "--tolerance", "0")
    assert finished.code == 1 and finished.stderr == ""
    assert finished.stdout.endswith("\nDIFFERENT: tensors equal, logits beyond 0\n")
    assert "tensors: 39 compared, 39 equal" in finished.stdout


@pytest.mark.slow
def test_a_difference_is_named(models: Path, tmp_path: Path) -> None:
    other = write_language(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"] *= 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    finished = _convert("verify", other, models / "export", "--no-logits")
    assert finished.code == 1 and finished.stderr == ""
    rows = [line for line in finished.stdout.splitlines() if "(32, 48)" in line]
    name = "language_model.decoder.layers.3.mlp.experts.experts.linear_fc2.weight"
    assert [row.split(maxsplit=5)[-1] for row in rows] == [
        f"{name} [{expert}]" for expert in ("vision.0", "shared.0", "shared.1", "text.0")
    ]
    assert "logits" not in finished.stdout
    assert finished.stdout.endswith("\nDIFFERENT: 4 tensors differ\n")


@pytest.mark.slow
def test_errors_are_one_sentence(models: Path, tmp_path: Path) -> None:
    checkpoint, export = str(models / "checkpoint"), str(models / "export")
    cases = [
        (["verify", checkpoint, str(tmp_path / "none")], (tmp_path / "none", "There is no")),
        (["verify", checkpoint, export, "--tolerance", "-1"], ("--tolerance", "-1.0")),
        (
            ["reshard", checkpoint, "--tp", "3", "--out", str(tmp_path / "out")],
            ("parallel.tensor", "3"),
        ),
        (
            ["reshard", checkpoint, "--pipeline-layers", "0", "4", "--out", str(tmp_path / "out")],
            ("--pipeline-layers", "0", "from 1"),
        ),
    ]
    for words, parts in cases:
        assert_user_error(_convert(*words), *parts)
    finished = _convert("reshard", checkpoint, "--ep", "0", "--out", str(tmp_path / "out"))
    assert_user_error(finished, "--ep is 0", "use")
    assert list(tmp_path.iterdir()) == []
