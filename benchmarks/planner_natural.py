"""Steps whose tokens go where the routers send them, predicted from the routing of earlier steps.

    torchrun --nproc-per-node 2 benchmarks/planner_natural.py --out FOLDER

Part of ``benchmarks/planner.py``.  The second stage of the digits demonstration trains for some
steps on its own data and logs its routing.  For each of the next steps the simulation gets that log
and the lengths of this rank's samples, nothing else: what it knows of the other ranks' samples is
that they are like these.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from planner_exact import tensors_released_by_gloo

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.digits.dataset import write_digits
from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.build import build_dataset, build_train_loader
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.process_lifetime import kill_children_on_exit
from moiie_megatron.mcore.run import run_sequentially
from moiie_megatron.planning.routing import replayed
from moiie_megatron.planning.trace import RankTrace
from moiie_megatron.planning.workload import MicroBatchShape, SampleShape, Workload
from moiie_megatron.routing_stats.counters import RoutingCounters
from moiie_megatron.simulation.rank import simulate_rank
from moiie_megatron.simulation.trace_step import trace_step
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.vlm.build import build_chunks

EXAMPLES: Final = Path(__file__).resolve().parents[1] / "examples/configs"
TRAINED: Final = 30  # steps
LOGGED: Final = 10  # of them, the last ones
PREDICTED: Final = 4  # steps after them
# By the number of processes.
CASES: Final = {
    1: {"one process": ("parallel.expert=1",)},
    2: {
        "EP=2": (),
        "EP=2, packing": ("data.packing=true",),
        "TP=2, EP=2": ("parallel.tensor=2",),
    },
}

Step = tuple[Workload, RankTrace]


def natural_steps(config: RunConfig, context: ParallelContext, log: Path) -> list[Step]:
    """Train, log the routing, and trace the steps after that."""
    state = prepare_training(config, context, build_chunks(config, context), steps=1000)
    state.model.train()
    loader = build_train_loader(
        config,
        build_dataset(config),
        consumed_samples=0,
        dp_rank=context.dp_rank,
        dp_size=context.dp_size,
        ranks=context,
    )
    counters = RoutingCounters(config, context, state.model)
    for step in range(TRAINED):
        if step == TRAINED - LOGGED:
            counters.record()  # those before do not count
        batches = next(loader)
        train_step(config, context, state, batches)
        counters.count_step(len(batches) * context.dp_size)
    record = counters.record()
    if record is not None:
        log.write_text(json.dumps({"step": TRAINED, **record}) + "\n")
    dist.barrier()
    steps = []
    for _ in range(PREDICTED):
        batches = next(loader)
        shapes = tuple(shape_of(batch) for batch in batches)
        with tensors_released_by_gloo():
            trace = trace_step(config, context, state, batches, None)
        steps.append((Workload(shapes, "the step's own samples"), trace))
    return steps


def shape_of(batch: Batch) -> MicroBatchShape:
    """A micro-batch without its content."""
    length = batch.tokens.shape[1]
    if batch.cu_seqlens is None:
        rows = tuple((sample,) for sample in _samples(batch, range(0, len(batch.tokens) + 1)))
        return MicroBatchShape(rows, length)
    return MicroBatchShape((tuple(_samples(batch, batch.cu_seqlens.tolist())),), length)


def _samples(batch: Batch, ends: Any) -> Iterator[SampleShape]:
    """The samples between neighbouring ends: rows, or positions of a packed row."""
    is_packed = batch.cu_seqlens is not None
    types, labels = ((t[0] if is_packed else t) for t in (batch.token_types, batch.labels))
    lengths = batch.sample_lengths.tolist()
    for start, end, tokens in zip(ends[:-1], ends[1:], lengths, strict=True):
        if tokens:  # the last segment of a packed row may be padding
            yield SampleShape(
                tokens=tokens,
                images=int((types[start:end] == IMAGE).sum()) // batch.num_image_tokens,
                labels=int((labels[start:end] != IGNORE).sum()),
            )


def prediction(config: RunConfig, step: Step, rank: int, world: int, log: Path) -> dict[str, Any]:
    """Predicted and real numbers of a step."""
    shapes, real = step
    simulated = simulate_rank(
        config,
        world=world,
        rank=rank,
        workload=shapes,
        routing=replayed(log, config.moe.layout, config.moe_layers),
    )
    traces = (simulated, real)
    return {
        "rows": [sum(map(sum, trace.expert_rows.values())) for trace in traces],
        "fullest": [max(map(max, trace.expert_rows.values())) for trace in traces],
        "experts": [_by_layer(trace.expert_rows) for trace in traces],
        "peak": [trace.memory.peak.total for trace in traces],
        "wire": [sum(t.bytes_sent for t in trace.transfers) for trace in traces],
        "flops": [sum(c.flops for c in trace.compute) for trace in traces],
    }


def _by_layer(rows: Mapping[int, tuple[int, ...]]) -> dict[str, list[int]]:
    return {str(layer): list(counts) for layer, counts in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args()
    kill_children_on_exit()  # this process ends with torchrun, too
    torch.set_num_threads(1)
    launch = dist_env_from(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        # Every rank has its own copy, of the same files.
        data = write_digits(Path(folder) / "data", train=400, test=20)
        sources = [{"records": str(data / "train.jsonl"), "images": str(data / "images")}]
        words = (
            f"data.sources={json.dumps(sources)}",
            f"data.tokenizer={data / 'tokenizer.model'}",
            "train.global_batch_size=32",
            "train.micro_batch_size=4",
            "checkpoint.init_from=null",
        )
        cases = CASES[launch.world_size]
        configs = [
            load_config(EXAMPLES / "digits-stage2.yaml", [*words, *case]) for case in cases.values()
        ]
        logs = {
            id(c): options.out / f"{n}.routing.jsonl" for n, c in zip(cases, configs, strict=True)
        }
        steps: list[list[Step]] = []
        run_sequentially(
            configs,
            launch,
            lambda config, context: steps.append(natural_steps(config, context, logs[id(config)])),
        )
    for name, config, found in zip(cases, configs, steps, strict=True):
        result = [
            prediction(config, step, launch.rank, launch.world_size, logs[id(config)])
            for step in found
        ]
        (options.out / f"{name}.{launch.rank}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
