"""Expert parallelism over NCCL: the reference's blocks, tokens and experts spread over GPUs."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers.launch import command, run
from tests.parity.blocks import BLOCKS

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_blocks_of_the_reference(processes: int) -> None:
    if processes > GPUS:
        pytest.skip(f"needs {processes} CUDA GPU(s), there are {GPUS}")
    words = command("tests/distributed/dispatcher_worker.py", ["cuda"], processes)
    passed = json.loads(run(words, 300).check().stdout.splitlines()[-1])
    assert sorted(passed) == sorted(f"golden {name} {case}" for name, _, case in BLOCKS)
