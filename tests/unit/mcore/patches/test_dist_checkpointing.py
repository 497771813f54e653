"""The queue of one value that a forked writer shares with the process that trains."""

from __future__ import annotations

import os
import queue

import pytest

from moiie_megatron.mcore.patches.dist_checkpointing import _ResultsFile


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
