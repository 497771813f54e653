"""GPUs by name and by numbers."""

from __future__ import annotations

import pytest

from moiie_megatron.planning.gpu_peaks import peak_flops
from moiie_megatron.planning.hardware import GIB, GPU_NAMES, CpuRates, cpu_machine, gpu
from tests.helpers.user_errors import user_error


@pytest.mark.parametrize("name", GPU_NAMES)
def test_a_gpu_has_the_peak_of_the_table(name: str) -> None:
    found = gpu(name)
    assert found.flops == peak_flops(name.upper())
    # torch cannot allocate all of the 80, 141 or 180 GB of a data sheet.
    assert 0.97 < found.memory / GIB / {"h200": 141, "b200": 180}.get(name, 80) < 1
    assert found.node_link > 5 * found.network_link
    assert found.fast.products > found.slow.products


def test_a_gpu_by_its_numbers() -> None:
    found = gpu("48,362,32,12.5", gpus_per_node=4)
    assert (found.memory, found.flops) == (48 * GIB, 362e12)
    assert (found.node_link, found.network_link) == (32e9, 12.5e9)
    h100 = gpu("h100")
    assert found.flops / found.memory_bandwidth == pytest.approx(h100.flops / h100.memory_bandwidth)
    assert [found.node_of(rank) for rank in (0, 3, 4, 11)] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "name", ["h1000", "80,989,450", "80,989,450,x", "80,989,450,-1", "1,2,3,nan"]
)
def test_other_gpus_are_refused(name: str) -> None:
    with user_error("--gpu", name):
        gpu(name)


def test_ranks_of_a_cpu_machine_share_it() -> None:
    machine = cpu_machine(4, 1 << 34, CpuRates(50e9, 40e9, 2e9, 5e-6, 1e-4))
    assert machine.cores == 4
    assert machine.memory_bandwidth == 10e9
    assert machine.fast == machine.slow
    assert machine.node_of(1000) == 0
