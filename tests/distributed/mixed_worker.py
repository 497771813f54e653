"""Worker of test_mixed_modalities.py: a few optimizer steps on batches made by hand.

Arguments: configuration, folder for the results (``rank0.json``, ...), and overrides.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from moiie_megatron.checkpoint.directory import latest_checkpoint
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.run import run_sequentially
from moiie_megatron.routing_stats.counters import RoutingCounters
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.vlm.build import build_chunks
from tests.helpers.batches import image_batch, text_batch

# What the micro-batches of rank 0 and rank 1 hold, step by step.
SCHEDULE = (
    (("text", "text"), ("images", "images")),
    (("images", "text"), ("text", "images")),
    (("text", "text"), ("text", "text")),
    (("images", "images"), ("images", "images")),
)

# Buckets of a few weights each: some modules have weights in two, and most are gathered late.
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000}


def steps(config: RunConfig, context: ParallelContext) -> list[dict[str, object]]:
    """The same batches for every number of ranks: rank r of n takes every n-th micro-batch."""
    model = build_chunks(config, context)
    # Fresh experts differ between layouts; those made from one dense FFN do not.
    assert config.checkpoint.init_from is not None
    source = latest_checkpoint(config.checkpoint.init_from)
    assert source is not None
    load_weights(source, context, model)
    train_state = prepare_training(config, context, model, len(SCHEDULE))
    train_state.model.train()
    counters = RoutingCounters(config, context, train_state.model)
    lines: list[dict[str, object]] = []
    for number, ranks in enumerate(SCHEDULE):
        # Micro-batch j of rank r, as the loader deals them.
        kinds = [kinds[j] for j in range(2) for kinds in ranks]
        batches = [
            {"text": text_batch, "images": image_batch}[kind](100 * number + place)
            for place, kind in enumerate(kinds)
        ]
        mine = batches[context.dp_rank :: context.dp_size]
        result = train_step(config, context, train_state, mine)
        counters.count_step(len(batches))
        lines.append(
            {
                "lm_loss": result.lm_loss,
                "grad_norm": result.grad_norm,
                "image_tokens": result.image_tokens,
                "aux": counters.losses().aux,
                "kinds": [int(len(batch.images) > 0) for batch in mine],
                "weights": weights_digest(train_state),
            }
        )
    return lines


def weights_digest(train_state: TrainState) -> list[float]:
    """Sums of the absolute weights of every parameter, as all ranks see them between steps."""
    train_state.gather_weights()
    return [float(p.detach().double().abs().sum()) for p in train_state.model.parameters()]


def main() -> None:
    file, out, *overrides = sys.argv[1:]
    launch = dist_env_from(os.environ)
    plain = load_config(file, overrides)
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    recompute = plain.model_copy(update={"megatron": {**full, "recompute_num_layers": 1}})
    configs = {"plain": plain, "recompute": recompute}
    for name, config in tuple(configs.items()):
        configs[f"{name} overlapped"] = config.model_copy(update={"ddp": OVERLAP})
    results: list[list[dict[str, object]]] = []
    run_sequentially(
        list(configs.values()),
        launch,
        lambda config, context: results.append(steps(config, context)),
    )
    path = Path(out) / f"rank{launch.rank}.json"
    path.write_text(json.dumps(dict(zip(configs, results, strict=True))))


if __name__ == "__main__":
    main()
