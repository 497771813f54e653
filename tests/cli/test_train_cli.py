"""tools/train.py: its help, its dry run, its overrides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, TRAIN, command, environment, run
from tests.helpers.tiny_run import tiny_values, write_config
from tests.helpers.tiny_tokenizer import CHATML, write_byte_tokenizer
from tests.helpers.user_errors import assert_user_error
from tests.unit.data.encode.chat_templates import PHI3 as PHI3_TEMPLATE


def billions(table: str, row: str) -> float:
    line = next(line for line in table.splitlines() if line.startswith(row))
    number, unit, _ = line.removeprefix(row).split()
    return float(number) / {"B": 1, "M": 1e3, "K": 1e6}[unit]


def test_help_answers_at_once() -> None:
    finished = run([sys.executable, TRAIN, "--help"], timeout=30).check()
    assert "key=value" in finished.stdout and "--dry-run" in finished.stdout


@pytest.mark.parametrize(
    ("language", "activated", "low", "high"),
    # Paper, table 1: activated parameters of the four-expert systems.
    [("llama3-8b", 11.3, 16, 17), ("phi3-mini", 5.5, 7, 8)],
)
def test_dry_run_counts_the_presets(
    language: str, activated: float, low: float, high: float, tmp_path: Path
) -> None:
    values = tiny_values(tmp_path, tmp_path / "run")
    values["language"] = {"preset": language}
    values["vision"] = {"preset": "siglip-so400m-384"}
    values["data"]["sequence_length"] = 2048
    values["parallel"] = {"pipeline": 2, "virtual_pipeline": 2}
    config = write_config(tmp_path / "run.yaml", values)
    table = run(command(TRAIN, [config, "--dry-run"]), timeout=30).check().stdout
    assert billions(table, "activated") == pytest.approx(activated, abs=0.05)
    assert low < billions(table, "total") < high
    assert "\npipeline rank 1: layers 8-15, 24-31, output layer\n" in table
    assert not (tmp_path / "run").exists()


def test_dry_run_needs_neither_torch_nor_memory(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path, tmp_path / "run"))
    program = (
        "import re, runpy, sys\n"
        f"sys.argv = ['train.py', {str(config)!r}, '--dry-run']\n"
        "try:\n    runpy.run_path('tools/train.py', run_name='__main__')\n"
        "except SystemExit as error:\n    assert error.code == 0, error.code\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules\n"
        # Not ru_maxrss: Linux hands that down from the process that forked this one.
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 0, result.stderr
    kilobytes = int(result.stdout.splitlines()[-1])
    assert kilobytes < 200_000


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path, tmp_path / "run"))

    def total(*overrides: str) -> float:
        words = [config, *overrides, "--dry-run"]
        return billions(run(command(TRAIN, words), timeout=30).check().stdout, "total")

    assert total("language.ffn_hidden_size=256") > 1.3 * total()


def test_dry_run_refuses_what_a_run_would(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path, tmp_path / "run"))
    finished = run(command(TRAIN, [config, "parallel.expert=3", "--dry-run"]), timeout=30)
    assert_user_error(finished, "parallel.expert", "3")


def test_dry_run_tries_the_template(tmp_path: Path) -> None:
    """One that a run would refuse, although the tokenizer has one."""
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer", CHATML, PHI3_TEMPLATE, CHATML[0])
    values = tiny_values(tmp_path, tmp_path / "run")
    values["data"]["tokenizer"], values["stage"]["template"] = str(tokenizer), "tokenizer"
    config = write_config(tmp_path / "run.yaml", values)
    finished = run(command(TRAIN, [config, "--dry-run"]), timeout=60)
    assert_user_error(finished, "chat template changes earlier text", "plain, llama3 or phi3")
