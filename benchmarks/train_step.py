"""A training step against a plain PyTorch and transformers implementation of the same model.

    python benchmarks/train_step.py [--json FILE]                 # one process
    torchrun --nproc-per-node 2 benchmarks/train_step.py          # EP=2 against torch's DDP
    python benchmarks/train_step.py --scaling                     # experts, sequence length

Forward, backward, clipping and update of both systems on the same samples, fp32, interleaved in
one process (the slower rank counts).  *Equal work*: samples of one length, no padding; logits of
tokens without a label are what the reference computes and ours leaves out.  *Natural*: text lengths
drawn from a log-normal distribution, most samples with an image; the reference pads every
micro-batch of 8 samples to its longest, ours packs.  Figures are ratios of real tokens per second,
ours over theirs.  Peak memory is that of a process with one of the two systems.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from reference_model import ReferenceModel

from moiie_megatron.config.schema import (
    DataConfig,
    LanguageConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    VisionConfig,
)
from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.stream.batch import collate
from moiie_megatron.data.stream.example import Example
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.mcore.process_lifetime import kill_children_on_exit, run_child
from moiie_megatron.selftest.checks.models import example
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.utils.timing import Timings, interleave, slower_rank
from moiie_megatron.vlm.build import build_chunks

MICRO_BATCH = 8  # samples
LONGEST = 512  # tokens of a sample


def run_config(
    processes: int, *, packing: bool = False, experts: tuple[int, int, int] = (1, 2, 1)
) -> RunConfig:
    """A small MoIIE: 8 layers, 4 of them with experts."""
    vision, shared, text = experts
    return RunConfig(
        output="unused",
        language=LanguageConfig(
            family="llama",
            num_layers=8,
            hidden_size=256,
            ffn_hidden_size=704,
            num_attention_heads=8,
            num_query_groups=4,
            vocab_size=8192,
            max_position_embeddings=4096,
        ),
        vision=VisionConfig(
            family="siglip",
            hidden_size=128,
            ffn_hidden_size=512,
            num_layers=4,
            num_attention_heads=4,
            image_size=56,
            patch_size=7,
            activation="gelu_pytorch_tanh",
        ),
        moe=MoEConfig(num_vision_experts=vision, num_shared_experts=shared, num_text_experts=text),
        parallel=ParallelConfig(expert=processes),
        stage=StageConfig(
            name="joint",
            moe=True,
            learning_rates={"vision": 1e-4, "connector": 1e-4, "language": 1e-4, "moe": 1e-4},
            template="plain",
            image_mode="square",
        ),
        data=DataConfig(sources=[], tokenizer="unused", sequence_length=LONGEST, packing=packing),
        train=TrainConfig(
            global_batch_size=MICRO_BATCH * processes,
            micro_batch_size=MICRO_BATCH,
            steps=1000,
            precision="fp32",
            device="cpu",
        ),
    )


def equal_samples(config: RunConfig, seed: int, count: int, length: int = 256) -> list[Example]:
    """Samples of one length with one image each."""
    generator = torch.Generator().manual_seed(seed)
    text = length - config.vision.num_image_tokens
    return [example(generator, text, 1, config) for _ in range(count)]


def natural_samples(config: RunConfig, seed: int, count: int) -> list[Example]:
    """Text of 90 tokens in the median, a few times as long in the tail; 80 % with an image."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        images = int(torch.rand((), generator=generator) < 0.8)
        length = float(torch.empty(()).log_normal_(4.5, 0.8, generator=generator))
        room = LONGEST - images * config.vision.num_image_tokens
        samples.append(example(generator, min(max(round(length), 8), room), images, config))
    return samples


Step = Callable[[], object]


def ours(config: RunConfig, context: ParallelContext, samples: list[Example]) -> Step:
    """This project's step, with packing where the configuration says so."""
    train_state = prepare_training(config, context, build_chunks(config, context), steps=1000)
    train_state.model.train()
    image_tokens = config.vision.num_image_tokens
    shape = PackingSpec(config.micro_batch_shape[1], LONGEST, image_tokens, pad_id=0)

    def step() -> None:
        if config.data.packing:
            batches = pack(samples, shape, context)
        else:
            batches = padded(samples, image_tokens)
        train_step(config, context, train_state, batches)

    return step


def reference(config: RunConfig, context: ParallelContext, samples: list[Example]) -> Step:
    """The plain implementation's step; padding to the longest sample of a micro-batch."""
    model: torch.nn.Module = ReferenceModel(config)
    weights = [p for p in model.parameters() if p.requires_grad]
    if context.size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        batches = padded(samples, config.vision.num_image_tokens)
        for number, batch in enumerate(batches, start=1):
            if context.size > 1:  # gradients are reduced with the last micro-batch
                model.require_backward_grad_sync = number == len(batches)
            (model(batch) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return step


def padded(samples: list[Example], num_image_tokens: int) -> list:
    """Micro-batches in the order of the samples."""
    return [
        collate(samples[i : i + MICRO_BATCH], pad_id=0, num_image_tokens=num_image_tokens)
        for i in range(0, len(samples), MICRO_BATCH)
    ]


def together(step: Step) -> Step:
    """All ranks start at once."""

    def run() -> None:
        dist.barrier()
        step()

    return run


def compare(case: str, context: ParallelContext, options: argparse.Namespace) -> Timings:
    """Both systems on the same samples; rank r has its own."""
    config = run_config(context.size, packing=case == "natural")
    draw = natural_samples if case == "natural" else equal_samples
    samples = draw(config, context.rank, options.samples)
    runs = {
        "ours": ours(config, context, samples),
        "reference": reference(config, context, samples),
    }
    steps = {name: together(step) for name, step in runs.items()}
    timings = slower_rank(interleave(steps, rounds=options.rounds))
    if context.rank == 0:
        real = sum(len(s.encoded.tokens) for s in samples)
        batches = padded(samples, config.vision.num_image_tokens)
        share = real / sum(batch.tokens.numel() for batch in batches)
        print(
            f"{case:8}  real tokens without packing {share:4.0%}  "
            f"reference {timings.median('reference') * 1e3:7.1f} ms a step  "
            f"tokens/s, ours over reference {timings.ratio('reference', 'ours'):.3f}",
            flush=True,
        )
    return timings


def scaling(context: ParallelContext, options: argparse.Namespace) -> None:
    """How the time of our step grows; relative to the first of each row, tokens per step equal."""
    tokens = options.samples * 256
    steps: dict[str, Step] = {}
    for experts in ((1, 2, 1), (2, 4, 2)):
        config = run_config(context.size, experts=experts)
        samples = equal_samples(config, context.rank, options.samples)
        steps[f"{sum(experts)} experts"] = together(ours(config, context, samples))
    for length in (128, 256, 512):
        config = run_config(context.size)
        samples = equal_samples(config, context.rank, tokens // length, length)
        steps[f"sequence {length}"] = together(ours(config, context, samples))
    timings = slower_rank(interleave(steps, rounds=options.rounds))
    if context.rank == 0:
        for first, *others in (list(steps)[:2], list(steps)[2:]):
            ratios = "  ".join(f"{name} {timings.ratio(name, first):.2f}" for name in others)
            milliseconds = timings.median(first) * 1e3
            print(
                f"{context.size} process(es)  {first} {milliseconds:.0f} ms, times that: {ratios}",
                flush=True,
            )


def peak_memory(system: str, options: argparse.Namespace) -> float:
    """GB of a process of its own that takes three steps with one system."""
    words = [sys.executable, __file__, "--only", system, "--samples", str(options.samples)]
    return float(run_child(words).split()[-1])


def only(system: str, context: ParallelContext, options: argparse.Namespace) -> None:
    config = run_config(1)
    build = ours if system == "ours" else reference
    step = build(config, context, equal_samples(config, 0, options.samples))
    for _ in range(3):
        step()
    # Not ru_maxrss, which begins with what the parent had.
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=16, help="per process and step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, help="per process; default: 2 / processes")
    parser.add_argument("--scaling", action="store_true", help="our step alone, other shapes")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--only", choices=("ours", "reference"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    kill_children_on_exit()  # this process ends with torchrun, too
    dist_env = dist_env_from(os.environ)
    torch.set_num_threads(options.threads or max(1, 2 // dist_env.world_size))
    context = init_parallel(ParallelConfig(expert=dist_env.world_size), dist_env, device="cpu")
    if options.only:
        only(options.only, context, options)
    elif options.scaling:
        scaling(context, options)
    else:
        ratios = {
            name: compare(case, context, options).ratio("reference", "ours")
            for name, case in (
                ("equal_work_over_reference", "equal"),
                ("packed_over_reference", "natural"),
            )
        }
        if context.rank == 0:
            result: dict[str, object] = {"processes": context.size, **ratios}
            if context.size == 1:
                peaks = {name: peak_memory(name, options) for name in ("ours", "reference")}
                print("peak memory  " + "  ".join(f"{n} {gb:.2f} GB" for n, gb in peaks.items()))
                result["peak_rss_gb"] = peaks
            if options.json:
                options.json.write_text(json.dumps(result, indent=2) + "\n")
    destroy_parallel()


if __name__ == "__main__":
    main()
