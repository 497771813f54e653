"""Set up and destroy torch.distributed and Megatron-Core's process groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.device import Device, choose_device
from moiie_megatron.mcore.dist_env import DistEnv, connect_store
from moiie_megatron.mcore.patches.moe_utils import (
    define_te_general_gemm,
    initialize_aux_loss_scale,
)


@dataclass(frozen=True)
class ParallelContext:
    """The device of this process and its place in Megatron's process groups.

    Attributes:
        groups: Megatron's process groups.
        rank: Rank of this process in the job.
        size: Number of processes of the job.
    """

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

    def gather_over_dp(self, numbers: Tensor) -> Tensor:
        """int64 (data-parallel ranks, ...): the numbers of all ranks; a collective.

        Args:
            numbers: int64 on the CPU, of the same shape on all ranks.
        """
        own = numbers.to(self.device.torch_device)
        gathered = own.new_empty((self.dp_size, *own.shape))
        dist.all_gather_into_tensor(gathered, own.unsqueeze(0), group=self.groups.dp)
        return gathered.cpu()

    def exchange_over_dp(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What every data-parallel rank has sent to this one; a collective.

        Args:
            parts: For every rank, uint8 (bytes,) on the CPU.
        """
        device, group = self.device.torch_device, self.groups.dp
        lengths = torch.tensor([len(part) for part in parts])
        sent = lengths.to(device)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        sizes = received.tolist()
        result = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        content = torch.cat(list(parts)).to(device)
        dist.all_to_all_single(result, content, sizes, lengths.tolist(), group=group)
        return list(result.cpu().split(sizes))


def init_parallel(
    parallel: ParallelConfig,
    dist_env: DistEnv,
    *,
    device: str = "auto",
    transformer_impl: str = "auto",
    seed: int = 1234,
    timeout: timedelta = timedelta(minutes=10),
    store: dist.Store | None = None,
) -> ParallelContext:
    """Initialise torch.distributed, Megatron's process groups and its RNG tracker.

    Args:
        device: ``train.device`` of the configuration.
        transformer_impl: ``train.transformer_impl`` of the configuration.
        timeout: Longest wait of a collective, and for all processes to arrive.
        store: Key-value store in which the processes find each other; default
            ``connect_store``.  A process that calls this several times in a row must pass stores
            with different key prefixes.

    Raises:
        UserError: No GPU although one was asked for (see ``choose_device``).
    """
    chosen = choose_device(device, dist_env.local_rank, transformer_impl)
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
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # Gloo groups beside NCCL ones are only for saving checkpoints in the old format.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(timeout.total_seconds() // 60) or 1,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    seed_everything(seed, groups)
    initialize_aux_loss_scale(chosen.torch_device)
    define_te_general_gemm()
    return ParallelContext(chosen, groups, dist.get_rank(), dist.get_world_size())


def seed_everything(seed: int, groups: ProcessGroupCollection) -> None:
    """Seed torch and Megatron's RNG tracker.

    Data-parallel ranks get the same seed, pipeline stages different ones.
    """
    torch.manual_seed(seed + 100 * groups.pp.rank())
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * groups.pp.rank())


def destroy_parallel() -> None:
    """Destroy the process groups; safe to call when there are none."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
