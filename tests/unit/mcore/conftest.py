"""One process on the CPU, as Megatron sees it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    torch.set_num_threads(1)
    yield init_parallel(ParallelConfig(), DistEnv(), device="cpu", seed=1)
    destroy_parallel()
