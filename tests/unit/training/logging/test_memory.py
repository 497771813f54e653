"""Peaks of GPU memory; the GPU is only pretended."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moiie_megatron.mcore.device import Device
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.logging.memory import peak_memory


def test_the_cpu_has_none(context: ParallelContext) -> None:
    assert peak_memory(context) == {}


def test_peaks_since_the_call_before(
    context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {"allocated": 3 * 2**30, "reserved": 7 * 2**29}
    for name in peaks:
        monkeypatch.setattr(torch.cuda, f"max_memory_{name}", lambda name=name: peaks[name])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: peaks.update(allocated=0, reserved=0)
    )
    monkeypatch.setattr(Device, "torch_device", torch.device("cpu"))
    gpu = replace(context, device=Device("cuda", "nccl"))
    assert peak_memory(gpu) == {"memory_allocated_gib": 3.0, "memory_reserved_gib": 3.5}
    assert set(peak_memory(gpu).values()) == {0.0}
