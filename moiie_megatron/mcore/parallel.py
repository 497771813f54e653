"""Process groups: one call builds Megatron-Core's grid, one call takes it down."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_utils

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.device import Device, choose_device
from moiie_megatron.mcore.dist_env import DistEnv, connect_store


@dataclass(frozen=True)
class ParallelContext:
    """This process among the others: its device and Megatron's process groups."""

    device: Device
    groups: ProcessGroupCollection
    rank: int
    size: int

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.groups.dp.size()

    @property
    def is_first_stage(self) -> bool:
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    def max_over_dp(self, number: int) -> int:
        """The maximum of ``number`` over the data-parallel ranks; a collective."""
        largest = torch.tensor(number, device=self.device.torch_device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.groups.dp)
        return int(largest)


def init_parallel(
    parallel: ParallelConfig,
    dist_env: DistEnv,
    *,
    device: str = "auto",
    seed: int = 1234,
    timeout: timedelta = timedelta(minutes=10),
    store: dist.Store | None = None,
) -> ParallelContext:
    """Initialise torch.distributed, Megatron's process groups and its RNG tracker.

    Args:
        store: Where the processes find each other, see ``connect_store``; default: a new one.
            Processes that start several worlds in turn must give each its own keys.

    Raises:
        UserError: No GPU although one was asked for (see ``choose_device``).
    """
    chosen = choose_device(device, dist_env.local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            chosen.collectives,
            store=connect_store(dist_env, timeout) if store is None else store,
            rank=dist_env.rank,
            world_size=dist_env.world_size,
            timeout=timeout,
            device_id=chosen.torch_device if chosen.is_cuda and dist_env.world_size > 1 else None,
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # Gloo groups beside NCCL ones are only for saving checkpoints in the old format.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(timeout.total_seconds() // 60) or 1,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    seed_everything(seed, groups)
    _unit_aux_loss_scale(chosen)
    _router_without_te()
    return ParallelContext(chosen, groups, dist.get_rank(), dist.get_world_size())


def seed_everything(seed: int, groups: ProcessGroupCollection) -> None:
    """Seed torch and Megatron's tracker: equal over data parallelism, distinct per stage."""
    torch.manual_seed(seed + 100 * groups.pp.rank())
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * groups.pp.rank())


def _unit_aux_loss_scale(device: Device) -> None:
    """Megatron keeps the scale of auxiliary losses in a class, with the shape it first got.

    The schedules give one of shape ``(1,)``; a backward pass before the first schedule would
    leave a scalar there, into which theirs cannot be copied.
    """
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(
        1, device=device.torch_device
    )


def _router_without_te() -> None:
    """Megatron's router asks for ``te_general_gemm``, an undefined name without Transformer
    Engine (NameError), on every device.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def destroy_parallel() -> None:
    """Destroy the process groups; safe to call when there are none."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
