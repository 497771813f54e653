"""Which device a run gets; GPUs are only pretended."""

from __future__ import annotations

import pytest
import torch

from moiie_megatron.mcore.device import choose_device
from tests.helpers.user_errors import user_error


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return monkeypatch


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_torch_for_cuda_without_a_gpu_is_an_error(wanted: str, no_gpu: pytest.MonkeyPatch) -> None:
    no_gpu.setattr(torch.version, "cuda", "13.0")
    causes = ("driver", "CUDA 13.0", "--gpus", "CUDA_VISIBLE_DEVICES", "train.device=cpu")
    with user_error(f"train.device is {wanted}", "0 GPU(s)", *causes):
        choose_device(wanted, local_rank=0)


def test_the_cpu_can_be_asked_for_with_torch_for_cuda(no_gpu: pytest.MonkeyPatch) -> None:
    no_gpu.setattr(torch.version, "cuda", "13.0")
    assert choose_device("cpu", local_rank=0).type == "cpu"


def test_torch_for_the_cpu_chooses_the_cpu(no_gpu: pytest.MonkeyPatch) -> None:
    no_gpu.setattr(torch.version, "cuda", None)
    assert choose_device("auto", local_rank=0).type == "cpu"
    with user_error("train.device is cuda", "0 GPU(s)", "built without CUDA"):
        choose_device("cuda", local_rank=0)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with user_error("process 2 of its node", "2 GPU(s)", "at most 2 processes"):
        choose_device("auto", local_rank=2)


def test_a_gpu_is_bound_after_its_environment_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(
        "moiie_megatron.mcore.device.prepare_gpu_environment", lambda: seen.append("environment")
    )
    device = choose_device("auto", local_rank=5)
    assert (device.type, device.collectives) == ("cuda", "nccl")
    assert seen == ["environment", 5]
