"""The self-test on the GPUs of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.launch import command, run

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_everything_on_gpus(processes: int, tmp_path: Path) -> None:
    if processes > GPUS:
        pytest.skip(f"needs {processes} CUDA GPU(s), there are {GPUS}")
    file = tmp_path / "report.json"
    words = command("tools/selftest.py", ["--device", "cuda", "--json", file], processes)
    done = run(words, timeout=800)
    assert done.code == 0, done.stdout + done.stderr
    assert json.loads(file.read_text())["ranks"] == processes
