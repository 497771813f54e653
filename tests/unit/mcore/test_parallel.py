"""The parallel context of one process; several processes are in tests/distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.dist_env import DistEnv, dist_env_from
from moiie_megatron.mcore.parallel import (
    ParallelContext,
    destroy_parallel,
    init_parallel,
    seed_everything,
)
from tests.helpers.user_errors import user_error


def test_one_process_is_first_and_last_of_everything(context: ParallelContext) -> None:
    assert (context.rank, context.size, context.dp_rank, context.dp_size) == (0, 1, 0, 1)
    assert context.is_first_stage and context.is_last_stage
    assert context.device.torch_device == torch.device("cpu") and not context.device.is_cuda


def test_the_loss_scale_has_the_shape_of_the_schedules(context: ParallelContext) -> None:
    assert MoEAuxLossAutoScaler.main_loss_backward_scale.shape == (1,)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([2.0]))
    assert MoEAuxLossAutoScaler.main_loss_backward_scale.tolist() == [2.0]
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0]))


def test_the_seed_decides_what_is_drawn(context: ParallelContext) -> None:
    drawn = []
    for seed in (3, 3, 4):
        seed_everything(seed, context.groups)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_groups_can_be_built_again(context: ParallelContext) -> None:
    """Stages of one job have different degrees of parallelism; taking down twice does nothing."""
    destroy_parallel()
    destroy_parallel()
    assert not dist.is_initialized()
    again = init_parallel(ParallelConfig(), DistEnv(), device="cpu", seed=1)
    assert again.size == 1 and dist.is_initialized()


def test_the_environment_of_torchrun() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert dist_env_from({}) == DistEnv(rank=0, world_size=1, local_rank=0, attempt=0)
    assert dist_env_from(environ) == DistEnv(rank=3, world_size=4, local_rank=1)
    restarted = environ | {"TORCHELASTIC_RESTART_COUNT": "2"}
    assert dist_env_from(restarted).attempt == 0  # every attempt has its own store
    shared = restarted | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert dist_env_from(shared).attempt == 2
    with user_error("WORLD_SIZE", "four", "torchrun"):
        dist_env_from(environ | {"WORLD_SIZE": "four"})
