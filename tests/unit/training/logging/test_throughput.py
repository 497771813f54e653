"""Rates of the log, from the counts of its steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moiie_megatron.mcore.device import Device
from moiie_megatron.planning.flops import Work, model_flops
from moiie_megatron.training.logging.throughput import Throughput, describe
from moiie_megatron.training.step import StepResult
from tests.unit.config.minimal import load_minimal

IMAGE_TOKENS = 16
STEP = StepResult(
    lm_loss=2.5,
    learning_rates={"moe": 1e-3},
    grad_norm=1.0,
    label_tokens=10,
    tokens=100,
    image_tokens=2 * IMAGE_TOKENS,
    positions=125,
    squared_lengths=5000,
    updated=True,
    also_summed=[],
    micro_batch_losses=torch.zeros(1),
)


def throughput(folder: Path, device: str = "cpu", *overrides: str) -> tuple[Throughput, float]:
    """On two ranks, and the FLOPs of ``STEP``."""
    config = load_minimal(folder, [f"output={folder / 'run'}", *overrides])
    context: Any = SimpleNamespace(size=2, device=Device(device, "gloo"))
    work = Work(tokens=100, labels=10, images=2, squared_lengths=5000)
    assert config.vision.num_image_tokens == IMAGE_TOKENS
    return Throughput(config, context), model_flops(config).of(work)


def test_steps_since_the_last_line(tmp_path: Path) -> None:
    rates, flops = throughput(tmp_path)
    for wait in (0.5, 0.1):
        rates.add(STEP, wait)
    values = rates.take(4.0)
    assert values == {
        "tokens_per_second": pytest.approx(50),
        "tflops_per_rank": pytest.approx(2 * flops / 4 / 2 / 1e12),
        "data_wait_fraction": pytest.approx(0.15),
    }
    rates.add(STEP, 3.0)  # of another rank, whose clock is another
    assert rates.take(2.0) | {"tflops_per_rank": 0} == {
        "tokens_per_second": pytest.approx(50),
        "tflops_per_rank": 0,
        "data_wait_fraction": 1,
    }


@pytest.mark.parametrize(
    ("device", "overrides", "peak"),
    [
        ("cuda", ["train.precision=bf16"], 989e12),
        ("cuda", ["train.precision=bf16", "log.peak_tflops=500"], 500e12),
        ("cpu", ["train.precision=fp32", "log.peak_tflops=0.5"], 0.5e12),
        ("cuda", ["train.precision=fp32"], None),  # the table is of bf16
        ("cpu", ["train.precision=bf16"], None),
    ],
)
def test_mfu(
    device: str,
    overrides: list[str],
    peak: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    rates, flops = throughput(tmp_path, device, *overrides)
    rates.add(STEP, 0.0)
    values = rates.take(0.001)
    assert values.get("mfu") == (None if peak is None else pytest.approx(flops / 0.002 / peak))


def test_an_unknown_gpu_has_no_mfu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    rates, _ = throughput(tmp_path, "cuda", "train.precision=bf16")
    assert "mfu" not in rates.take(1.0)


def test_what_the_operator_reads() -> None:
    values = {"tokens_per_second": 81234.4, "tflops_per_rank": 412.34, "mfu": 0.4169}
    line = "81234 tok/s | 412.3 TFLOP/s/rank | MFU 41.7% | data wait 0.1%"
    assert describe(values | {"data_wait_fraction": 0.001}) == line
