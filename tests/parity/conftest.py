"""One process on the CPU, as Megatron sees it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moiie_megatron.backend.parallel import Launch, World, start_world, stop_world
from moiie_megatron.config.schema import ParallelConfig


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    torch.set_num_threads(1)
    yield start_world(ParallelConfig(), Launch(), device="cpu", seed=1)
    stop_world()
