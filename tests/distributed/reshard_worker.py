"""One rank of test_reshard.py: loads resharded checkpoints into models of their layouts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.checkpoint.save_load import sharding_metadata
from moiie_megatron.config.load import load_config
from moiie_megatron.convert.dcp.reader import CheckpointReader
from moiie_megatron.mcore.parallel import DistEnv, destroy_parallel, init_parallel
from moiie_megatron.utils.digest import same_bytes
from moiie_megatron.vlm.build import build_chunks


def _shards(folder: Path, original: CheckpointReader, launch: DistEnv) -> list[Any]:
    """What this rank asked for: name, offsets, shape, and whether it got the original's bytes."""
    config = load_config(folder / "run.yaml", ["train.device=cpu"])
    context = init_parallel(config.active_parallel, launch, device="cpu", seed=1)
    model = build_chunks(config, context)
    load_weights(folder, context, model)
    shards: list[ShardedTensor] = []
    for entry in nested_values(model.sharded_state_dict(metadata=sharding_metadata(context))):
        if isinstance(entry, ShardedTensorFactory):
            shards += nested_values(entry.build())
        elif isinstance(entry, ShardedTensor):
            shards.append(entry)
    found = []
    for shard in shards:
        shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        part = original.get_part(shard.key, shard.global_offset, shape).reshape(shard.local_shape)
        found.append((shard.key, shard.global_offset, shape, same_bytes(shard.data, part)))
    parallel_state.destroy_model_parallel()
    return found


def main() -> None:
    """Arguments: a folder for the results, resharded checkpoints; ``original`` lies beside each."""
    out, *folders = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    launch = DistEnv(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    results = {}
    for folder in folders:
        reader = CheckpointReader(folder.with_name("original"))
        results[str(folder)] = _shards(folder, reader, launch)
    (out / f"rank{launch.rank}.json").write_text(json.dumps(results))
    destroy_parallel()


if __name__ == "__main__":
    main()
