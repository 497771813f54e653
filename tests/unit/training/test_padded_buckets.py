"""Gradients in many small buckets, each with padding behind its parameters, as on GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moiie_megatron.config.load import load_config
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.training import run, state
from moiie_megatron.training.loop import train
from tests.helpers.tiny_run import make_digits, read_metrics, tiny_values, write_config

BUCKET = 20_000  # values; the largest parameter is larger


def test_a_run_resumes_bit_for_bit(
    tmp_path: Path, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = state.ddp_config
    padding: list[int] = []

    def small_buckets(*arguments: Any) -> Any:
        return replace(original(*arguments), overlap_grad_reduce=True, bucket_size=BUCKET)

    def prepare(*arguments: Any) -> Any:
        prepared = state.prepare_training(*arguments)
        (ddp,) = prepared.ddp
        for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
            padding.extend(b.grad_data.numel() - b.numel_unpadded for b in buffer.buckets)
        return prepared

    monkeypatch.setattr(state, "ddp_config", small_buckets)
    monkeypatch.setattr(run, "prepare_training", prepare)
    make_digits(tmp_path)
    values = tiny_values(tmp_path, tmp_path / "run")
    values["train"] |= {"steps": 4, "global_batch_size": 4}
    values["checkpoint"] = {"interval": 2, "keep": 2}
    config = load_config(write_config(tmp_path / "run.yaml", values), [])

    train(config, context)
    whole = [line["lm_loss"] for line in read_metrics(tmp_path / "run")]
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_0000002\n")
    seed_everything(99, context.groups)  # what resumes has other weights at first
    train(config, context)

    assert len(padding) > 20 and sum(count > 0 for count in padding) > 10
    assert [line["lm_loss"] for line in read_metrics(tmp_path / "run")] == whole
    assert len(set(whole)) == 4
