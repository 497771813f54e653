"""One rank of test_layouts.py: training steps in layouts of two ranks.

Argument: the directory for the results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moiie_megatron.config.schema import ParallelConfig
from moiie_megatron.mcore.config import ddp_config
from moiie_megatron.mcore.dist_env import connect_store, dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.training import state
from tests.te.steps import course, fused_weight_gradients, padded, tiny_config, with_section

LAYOUTS = {
    "dp2": ParallelConfig(),
    "ep2": ParallelConfig(expert=2),
    "tp2-sp": ParallelConfig(tensor=2),
    "tp2-sp-ep2": ParallelConfig(tensor=2, expert=2),
    "pp2": ParallelConfig(pipeline=2),
    "pp2-virtual": ParallelConfig(pipeline=2, virtual_pipeline=2),
}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
# Fields of Megatron's configuration; whether weight gradients are fused and reductions overlap
# with the backward pass, both as on GPUs.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "overlap": ({}, True),
    "overlap-recompute": (FULL, True),
}
BUCKET = 20_000  # parameters: several buckets in the tiny model
MIXED, TEXT = ["image", "two images"], ["text", "short"]


def steps(context: ParallelContext) -> list[list[Any]]:
    """Micro-batches of both kinds; the data-parallel ranks have other ones at the same time."""
    kinds = [[MIXED, TEXT], [TEXT, TEXT], [TEXT, TEXT], [MIXED, MIXED]]
    if context.dp_rank == 1:
        kinds = [[TEXT, MIXED], [TEXT, TEXT], [MIXED, TEXT], [TEXT, MIXED]]
    return [
        [padded(names, multiple_of=context.groups.tp.size()) for names in step] for step in kinds
    ]


def overlapped(original: Any, config: Any, device: Any) -> Any:
    """On the CPU the project leaves it off."""
    return dataclasses.replace(
        original(config, device), overlap_grad_reduce=True, bucket_size=BUCKET
    )


def main() -> None:
    torch.set_num_threads(1)
    dist_env = dist_env_from(os.environ)
    store = connect_store(dist_env)
    results: dict[str, Any] = {}
    for name, parallel in LAYOUTS.items():
        context = init_parallel(
            parallel, dist_env, device="cpu", store=dist.PrefixStore(name, store)
        )
        assert context.device.transformer_engine
        device = dataclasses.replace(context.device, transformer_engine=False)
        local = dataclasses.replace(context, device=device)
        config = tiny_config(parallel=parallel)
        if parallel.virtual_pipeline > 1:  # a layer for every stage
            config = with_section(config, "language", num_layers=parallel.stages)
        results[name] = {"local": course(config, local, steps(local))}
        for variant, (options, overlap) in VARIANTS.items():
            state.ddp_config = partial(overlapped, ddp_config) if overlap else ddp_config
            changed = config.model_copy(update={"megatron": options})
            with fused_weight_gradients() if overlap else nullcontext():
                results[name][variant] = course(changed, context, steps(context))
        destroy_parallel()
    (Path(sys.argv[1]) / f"rank{dist_env.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
