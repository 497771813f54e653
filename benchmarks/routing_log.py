"""What logging costs: training steps of one model that count nothing, count, and log every step.

    python benchmarks/routing_log.py [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/routing_log.py     # EP over all processes

Three kinds of step alternate in one process: ``silent`` has the counters of all MoE layers
switched off, ``counted`` counts but reports nothing, ``logged`` reduces everything after the step
and writes it: the line of metrics.jsonl, the record of routing.jsonl, TensorBoard.  The overhead
is the median over rounds of a step's time over that of the silent step of the same round, less 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from moiie_megatron.config.schema import (
    DataConfig,
    LanguageConfig,
    LogConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    VisionConfig,
)
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.run import run_distributed
from moiie_megatron.moe.layer import MoIIELayer
from moiie_megatron.routing_stats.counters import RoutingCounters
from moiie_megatron.training.logging.run_log import RunLog, StepReport
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.training.step import StepResult, train_step
from moiie_megatron.utils.timing import interleave, slower_rank
from moiie_megatron.vlm.build import build_chunks

VOCABULARY = 512
IMAGE_SIZE, PATCH = 84, 7  # 144 image tokens


def make_config(options: argparse.Namespace, processes: int, output: str) -> RunConfig:
    """A small model with the proportions of a real one; two micro-batches per rank and step."""
    parts = ("vision", "connector", "language", "moe")
    return RunConfig(
        output=output,
        language=LanguageConfig(
            family="llama",
            num_layers=options.layers,
            hidden_size=options.hidden,
            ffn_hidden_size=options.ffn,
            num_attention_heads=4,
            num_query_groups=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=options.tokens,
        ),
        vision=VisionConfig(
            family="siglip",
            hidden_size=64,
            ffn_hidden_size=128,
            num_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            activation="gelu_pytorch_tanh",
        ),
        parallel=ParallelConfig(expert=processes),
        stage=StageConfig(
            name="joint",
            moe=True,
            learning_rates=dict.fromkeys(parts, 1e-4),
            template="plain",
            image_mode="square",
        ),
        data=DataConfig(sources=[], tokenizer="none", sequence_length=options.tokens),
        train=TrainConfig(
            global_batch_size=4 * processes,
            micro_batch_size=2,
            steps=1000,
            precision="fp32",
            device="cpu",
        ),
        log=LogConfig(routing_interval=1),
    )


def make_batch(config: RunConfig, seed: int) -> Batch:
    """Rows of random text with one random image each."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    tokens = torch.randint(VOCABULARY, (rows, length), generator=generator)
    types = torch.zeros(rows, length, dtype=torch.int8)
    count = config.vision.num_image_tokens
    types[:, :count] = IMAGE
    labels = tokens.roll(-1, dims=1)
    labels[types == IMAGE] = -100
    side = config.vision.image_size
    images = torch.randint(256, (rows, 3, side, side), generator=generator, dtype=torch.uint8)
    positions = torch.arange(length).repeat(rows, 1)
    return Batch(tokens, labels, positions, types, images, count, ("",) * rows)


class Run:
    """The three kinds of step of one model."""

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        self.config, self.context = config, context
        model = build_chunks(config, context)
        self.layers = [m for m in model.modules() if isinstance(m, MoIIELayer)]
        self.train_state: TrainState = prepare_training(config, context, model, steps=1000)
        self.train_state.model.train()
        self.counters = RoutingCounters(config, context, model)
        self.log = RunLog(config, context, start_step=0, total_steps=1000)
        self.batches = [make_batch(config, 10 * context.rank + number) for number in range(2)]
        self.number = 0

    def train(self) -> StepResult:
        dist.barrier()
        result = train_step(self.config, self.context, self.train_state, self.batches)
        self.number += 1
        return result

    def silent(self) -> None:
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stats = layer.router.stats
                for place, name in (
                    (stats, "add_choices"),
                    (layer, "_count_rows"),
                ):
                    setattr(place, name, lambda *arguments: None)
                    stack.callback(delattr, place, name)
            self.train()

    def counted(self) -> None:
        self.train()

    def logged(self) -> None:
        result = self.train()
        self.counters.count_step(len(self.batches) * self.context.dp_size)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            self.log.step(StepReport(self.number, result, self.counters.losses()))
        self.log.routing(self.number, self.counters.record())


def measure(run: Run, rounds: int) -> dict[str, object]:
    kinds: dict[str, Callable[[], object]] = {
        "silent": run.silent,
        "counted": run.counted,
        "logged": run.logged,
    }
    timings = slower_rank(interleave(kinds, rounds=rounds))
    return {
        "processes": run.context.size,
        "moe_layers": len(run.layers),
        "step_ms": 1e3 * timings.median("silent"),
        "counting_overhead": timings.ratio("counted", "silent") - 1,
        "overhead": timings.ratio("logged", "silent") - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="every second one has experts")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=704)
    parser.add_argument("--tokens", type=int, default=256, help="per row")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist_env = dist_env_from(os.environ)

    with tempfile.TemporaryDirectory() as output:
        config = make_config(options, dist_env.world_size, output)

        def body(context: ParallelContext) -> None:
            run = Run(config, context)
            result = measure(run, options.rounds)
            run.log.close()
            if context.rank != 0:
                return
            print(
                f"{result['processes']} process(es), {result['moe_layers']} MoE layers, step "
                f"{result['step_ms']:.0f} ms: counting {result['counting_overhead']:+.2%}, "
                f"counting and logging every step {result['overhead']:+.2%}",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(result, indent=2) + "\n")

        run_distributed(config, dist_env, body)


if __name__ == "__main__":
    main()
