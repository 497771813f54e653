"""Saving with every version, and the queue that a forked writer shares with the training."""

from __future__ import annotations

import os
import queue
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.patches.dist_checkpointing import COMMON_FILE, _ResultsFile, plan_save


def test_the_common_state_is_a_file_with_every_version(
    context: ParallelContext, tmp_path: Path
) -> None:
    """Checkpoints of newer versions would otherwise be unreadable for older ones."""
    state = {"weight": ShardedTensor.from_rank_offsets("weight", torch.ones(2)), "step": 5}
    plan_save(state, tmp_path, {"kind": "test"}).execute_sync()
    written = torch.load(tmp_path / COMMON_FILE, weights_only=True)
    assert written["step"] == 5 and written["content_metadata"]["kind"] == "test"
    assert dist_checkpointing.load_common_state_dict(str(tmp_path)) == written
    wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(2))}
    loaded = dist_checkpointing.load(wanted, str(tmp_path))
    assert torch.equal(loaded["weight"], torch.ones(2)) and loaded["step"] == 5


def test_a_value_is_taken_once() -> None:
    results = _ResultsFile()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    for value in ({0: ["a"] * 1000}, {1: []}):
        pid = os.fork()
        if not pid:
            results.put(value)
            os._exit(0)
        os.waitpid(pid, 0)
        assert results.get_nowait() == value
        with pytest.raises(queue.Empty):
            results.get_nowait()


def test_half_a_value_is_none() -> None:
    results = _ResultsFile()
    results.put(list(range(1000)))
    results._file.truncate(100)
    with pytest.raises(queue.Empty):
        results.get_nowait()
