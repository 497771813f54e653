"""What a process on a GPU sets for itself, and whether fp32 is TF32 there."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from moiie_megatron.mcore.gpu_environment import prepare_gpu_environment, tf32_users


@pytest.fixture
def set_in_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch's allocator was told."""
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    return told


def test_what_is_missing_is_set(set_in_torch: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """As torchrun starts a process."""
    environ = {"OMP_NUM_THREADS": "1"}
    with caplog.at_level(logging.WARNING):
        prepare_gpu_environment(environ)
    assert environ == {
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    assert set_in_torch == ["expandable_segments:True"]
    assert len(caplog.messages) == 1 and "OMP_NUM_THREADS=8" in caplog.messages[0]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_is_set_is_kept(
    name: str, set_in_torch: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    environ = {"OMP_NUM_THREADS": "4", "CUDA_DEVICE_MAX_CONNECTIONS": "8", name: "backend:native"}
    before = dict(environ)
    with caplog.at_level(logging.WARNING):
        prepare_gpu_environment(environ)
    assert environ == before and not set_in_torch and not caplog.messages


@pytest.fixture
def precisions() -> Iterator[None]:
    """torch's settings, which the test may change."""
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [part.fp32_precision for part in parts]
    yield
    for part, value in zip(parts, before, strict=True):
        part.fp32_precision = value


def test_tf32_is_read_from_torch(precisions: None) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert tf32_users(False, {}) == []
    assert tf32_users(True, {}) == ["Transformer Engine's layers"]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert tf32_users(False, {}) == ["torch's matrix products"]
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert len(tf32_users(True, {})) == 3
    assert tf32_users(True, {"NVIDIA_TF32_OVERRIDE": "0"}) == []
