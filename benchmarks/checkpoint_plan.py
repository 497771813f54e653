"""How a checkpoint is divided among ranks: bytes to write, to read, and in host memory.

    python benchmarks/checkpoint_plan.py examples/configs/llama3-stage2.yaml --world 8 16 64

Every rank's sharded state is the real one: the model, its data-parallel buffers and the
optimizer's ranges are built by the program at full size, on fake tensors and fake process groups
(torch.testing).  Megatron-Core then divides replicated weights as it does in a save and a load.
Ranks of a pipeline stage differ in their ranks in the process groups alone, so a stage is built
once, and its groups are told another rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import (
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch.testing._internal.distributed.fake_pg import FakeStore

from moiie_megatron.checkpoint.optimizer_shards import (
    owned_ranges,
    shards_of_range,
    without_copies,
)
from moiie_megatron.checkpoint.save_load import sharding_metadata
from moiie_megatron.cli.plan_inputs import read_unset_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.simulation.fake_values import fake_tensors
from moiie_megatron.simulation.fake_world import fake_world
from moiie_megatron.simulation.substitutes import building
from moiie_megatron.simulation.trace_step import named_groups
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.vlm.build import build_chunks

STATE = ("param", "exp_avg", "exp_avg_sq")  # what the optimizer keeps of a parameter, in fp32
Shards = list[ShardedTensor]


@dataclass(frozen=True)
class RankPlan:
    """One rank's part, in bytes.

    Attributes:
        written: Tensors that it writes; as much is in host memory while a save is under way in
            the background.
        read: Tensors that it reads in the same layout.
        largest: The largest tensor that it writes: in host memory in a save in the foreground,
            and when it is read again.
        gathered: Host memory of Megatron-Core's fully reshardable format on this rank.
    """

    written: int
    read: int
    largest: int
    gathered: int


def plan_checkpoint(config: RunConfig, world: int) -> list[RankPlan]:
    """The plan of every rank."""
    places = group_ranks(config, world)
    saved: dict[int, Shards] = {}
    loaded: dict[int, Shards] = {}
    gathered: dict[int, int] = {}
    for stage in range(config.active_parallel.pipeline):
        ranks = [rank for rank in range(world) if places[rank]["pp"] == stage]
        with built_stage(config, ranks[0], world) as (context, state):
            held = sum(b.numel_unpadded for p in parts(state) for b in p.buffers) * 4 * len(STATE)
            for rank in ranks:
                with told_ranks(context, places[rank]):
                    weights, optimizer = shards_of_rank(context, state)
                loaded[rank] = [*weights, *optimizer.values()]
                saved[rank] = [*weights, *without_copies(optimizer).values()]
                gathered[rank] = held
    writers = divided(saved, range(world))
    replicas: dict[Any, list[int]] = defaultdict(list)
    for rank in range(world):
        replicas[places[rank]["tp"], places[rank]["pp"]].append(rank)
    read: Counter[int] = Counter()
    for group in replicas.values():
        for rank, shards in divided(loaded, group, is_loading=True).items():
            read[rank] = sum(map(num_bytes, shards))
    return [
        RankPlan(
            written=sum(map(num_bytes, writers[rank])),
            read=read[rank],
            largest=max(map(num_bytes, writers[rank]), default=0),
            gathered=gathered[rank],
        )
        for rank in range(world)
    ]


def divided(
    by_rank: Mapping[int, Shards], group: Sequence[int], *, is_loading: bool = False
) -> dict[int, Shards]:
    """What each rank of a group writes or reads, as Megatron-Core's wrappers divide it."""
    dist.init_process_group("fake", rank=0, world_size=len(group), store=FakeStore())

    def gather(gathered: list[Any], *_: Any, **__: Any) -> None:
        gathered[:] = [by_rank[rank] for rank in group]

    with patch.object(dist, "all_gather_object", gather):
        plan = determine_main_replica_uniform_distribution({}, None, is_loading)
    dist.destroy_process_group()
    assert plan is not None
    result: dict[int, Shards] = {rank: [] for rank in group}
    for shard, index in plan.main_rank_for_shard.items():
        if shard in plan.shards_in_this_group:
            result[group[index]].append(plan.shard_to_metadata[shard])
    return result


def group_ranks(config: RunConfig, world: int) -> list[dict[str, int]]:
    """Each rank's ranks in the process groups, by their names."""
    places = []
    for rank in range(world):
        with fake_world(config, rank, world) as context:
            groups = named_groups(context)
            places.append({name: group.rank() for name, group in groups.items()})
    return places


@contextmanager
def built_stage(
    config: RunConfig, rank: int, world: int
) -> Iterator[tuple[ParallelContext, TrainState]]:
    """Model, buffers and optimizer of a rank at full size, without values."""
    with fake_world(config, rank, world) as context, building():
        with fake_tensors():
            state = prepare_training(config, context, build_chunks(config, context), steps=10)
        yield context, state


@contextmanager
def told_ranks(context: ParallelContext, ranks: Mapping[str, int]) -> Iterator[None]:
    """Process groups answer with these ranks."""
    by_group = {id(group): ranks[name] for name, group in named_groups(context).items()}

    def rank(group: Any) -> int:
        return by_group[id(group)]

    with ExitStack() as stack:
        stack.enter_context(patch.object(dist.ProcessGroup, "rank", rank))
        # Kept by Megatron-Core when the groups were made.
        for name, value in (("TENSOR", ranks["tp"]), ("PIPELINE", ranks["pp"])):
            stack.enter_context(
                patch.object(parallel_state, f"_MPU_{name}_MODEL_PARALLEL_RANK", value)
            )
        yield


def parts(state: TrainState) -> list[Any]:
    return state.optimizer.chained_optimizers


def shards_of_rank(
    context: ParallelContext, state: TrainState
) -> tuple[Shards, dict[str, ShardedTensor]]:
    """Weights and optimizer state of the rank that the groups tell."""
    model_state = state.model.sharded_state_dict(metadata=sharding_metadata(context))
    entries = {id(entry.data): entry for entry in model_state.values()}
    optimizer: dict[str, ShardedTensor] = {}
    for part in parts(state):
        ranges = [part._build_gbuf_range_map(buffer) for buffer in part.buffers]
        with patch.object(part, "gbuf_ranges", ranges):
            for parameter, start, stop in owned_ranges(part):
                tensors = dict.fromkeys(STATE, torch.empty(stop - start, device="meta"))
                for shard in shards_of_range(entries[id(parameter)], start, stop, tensors):
                    optimizer[f"{shard.key} {shard.global_offset}"] = shard.without_data()
    apply_factories(model_state)
    weights = [s for s in nested_values(model_state) if isinstance(s, ShardedTensor)]
    return [weight.without_data() for weight in weights], optimizer


def num_bytes(shard: ShardedTensor) -> int:
    return torch.Size(shard.local_shape).numel() * shard.dtype.itemsize


def summary(world: int, plans: Sequence[RankPlan]) -> dict[str, Any]:
    values = {f.name: [getattr(p, f.name) for p in plans] for f in dataclasses.fields(RankPlan)}
    mean = statistics.mean(values["written"])
    return {"world": world, "balance": max(values["written"]) / mean} | values


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan a checkpoint at full size.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE")
    parser.add_argument("--world", type=int, nargs="+", default=[8])
    parser.add_argument("--json", action="store_true", help="bytes of every rank")
    arguments = parser.parse_intermixed_args()
    config = read_unset_config(arguments.config, [*arguments.overrides, "train.device=cpu"])
    torch.set_num_threads(1)
    if not arguments.json:
        print("GB per rank (largest)  write  max/mean   read  host, front / back  gathered before")
    for world in arguments.world:
        found = summary(world, plan_checkpoint(config, world))
        if arguments.json:
            print(json.dumps(found))
            continue
        gb = {name: max(value) / 1e9 for name, value in found.items() if isinstance(value, list)}
        print(
            f"{world:16} ranks {gb['written']:10.2f} {found['balance']:9.3f} {gb['read']:6.2f}"
            f" {gb['largest']:12.2f} / {gb['written']:5.2f} {gb['gathered']:15.2f}"
        )


if __name__ == "__main__":
    main()
