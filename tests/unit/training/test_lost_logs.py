"""A run whose log cannot be written saves and stops; the next start goes on from there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.config.load import load_config
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.logging import jsonl
from moiie_megatron.training.loop import train
from tests.helpers.tiny_run import make_digits, read_metrics, tiny_values, write_config
from tests.helpers.user_errors import user_error


def test_progress_is_saved(
    tmp_path: Path, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = jsonl._write_whole

    def full_from_step_2(file: Any, record: Any) -> None:
        if record["step"] > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file, record)

    make_digits(tmp_path)
    values = tiny_values(tmp_path, tmp_path / "run")
    values["train"] |= {"steps": 5, "global_batch_size": 2}
    config = load_config(write_config(tmp_path / "run.yaml", values), [])

    monkeypatch.setattr(jsonl, "_write_whole", full_from_step_2)
    output = tmp_path / "run"
    with user_error(output / "metrics.jsonl", "No space left on device", "step_0000003"):
        train(config, context)
    assert (output / "checkpoints" / "latest").read_text() == "step_0000003\n"
    assert not list(output.rglob("*.writing")) and not (output / "running.json").exists()

    monkeypatch.setattr(jsonl, "_write_whole", original)
    train(config, context)
    assert [line["step"] for line in read_metrics(output)] == [1, 4, 5]
