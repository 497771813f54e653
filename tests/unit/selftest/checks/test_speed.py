"""Figures of a GPU, with a CPU in its place: what is computed from what, and what is absurd."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from moiie_megatron.config.schema import ParallelConfig, RunConfig
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.planning.parameters import count_parameters
from moiie_megatron.selftest.check import Session
from moiie_megatron.selftest.checks import speed, versions
from moiie_megatron.selftest.checks.models import tiny_config
from tests.unit.selftest.sessions import session

GB = 10**9


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    torch.set_num_threads(1)
    yield init_parallel(ParallelConfig(), DistEnv(), device="cpu", seed=1)
    destroy_parallel()


@pytest.fixture
def gpu(context: ParallelContext, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session that takes the CPU for an H100, at toy size."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85 * GB
    )
    for name, value in {
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "max_memory_allocated": 3 * 2**30,
        "reset_peak_memory_stats": None,
        "device_count": 1,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, value=value: value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(speed.LAYER, "cuda", speed.LAYER["cpu"])
    made = session(context)
    made.device = "cuda"
    return made


def toy(ranks: int, layers: int) -> RunConfig:
    config = tiny_config(ranks, "fp32", packing=True)
    return speed._with_rows(config, 2, config.data.sequence_length)


def test_step(gpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "large_config", toy)
    monkeypatch.setattr(speed, "peak_flops", lambda name: 1e9)
    found = speed.check_step_speed(gpu)
    assert found.status == "PASS", found.reason
    figures = found.figures
    assert figures["peak_memory_gib"] == 3
    assert figures["tokens_per_second_per_rank"] > 0 and len(figures["losses"]) == 7
    # Both are rounded.
    assert figures["mfu"] == pytest.approx(1e3 * figures["tflops_per_rank"], abs=60)
    assert "MFU" in found.reason and "toy" not in found.reason


@pytest.mark.parametrize(("peak", "status"), [(1e18, "FAIL"), (None, "PASS")])
def test_absurd_mfu(
    peak: float | None, status: str, gpu: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that does less than a hundredth of what it can is broken; one that nobody knows may."""
    monkeypatch.setattr(speed, "large_config", toy)
    monkeypatch.setattr(speed, "peak_flops", lambda name: peak)
    assert speed.check_step_speed(gpu).status == status


def test_layer(gpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    found = speed.check_layer_speed(gpu)
    assert found.status == "PASS", found.reason
    assert set(found.figures["milliseconds"]) == {"limit", "moiie", "alltoall"}
    monkeypatch.setattr(speed, "_ABSURD_RATIO", 0.01)
    assert speed.check_layer_speed(gpu).status == "FAIL"


@pytest.mark.parametrize(("memory", "layers"), [(150, 16), (85, 16), (48, 8), (10, None)])
def test_the_largest_model_that_fits(
    memory: int, layers: int | None, gpu: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=memory * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda rank: properties)
    config = speed._step_config(gpu)
    assert (config and config.language.num_layers) == layers
    if config is None:
        assert speed.check_step_speed(gpu).status == "FAIL"


def test_a_1b_model_is_activated() -> None:
    """Llama-3.2-1B's decoder without its large vocabulary, and a second expert in 8 layers."""
    count = count_parameters(speed.large_config(1, 16))
    assert 1.3e9 < count.activated - count.vision < 1.7e9
    assert len(speed.large_config(1, 16).moe_layers) == 8


def test_versions(gpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in versions.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = versions.check_versions(gpu)
    assert found.status == "PASS", found.reason
    assert found.figures["gpu"] == "NVIDIA H100 80GB HBM3" and found.figures["nccl"] == "2.28.9"
    assert found.figures["memory_gib"] == pytest.approx(79.2)
    assert "set CUDA_DEVICE_MAX_CONNECTIONS=1 and PYTORCH_CUDA_ALLOC_CONF" in found.reason
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert "set CUDA" not in versions.check_versions(gpu).reason
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build without CUDA" in versions.check_versions(gpu).reason
