"""Process groups of any size in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel


@contextmanager
def fake_world(config: RunConfig, rank: int, world: int) -> Iterator[ParallelContext]:
    """The process groups of one rank, whose peers do not exist.

    A collective returns at once.  What the peers would have sent is what this rank sends itself.
    """
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_parallel(
            config.active_parallel,
            DistEnv(rank, world),
            device="cpu",
            transformer_impl=config.train.transformer_impl,
        )
    finally:
        destroy_parallel()
