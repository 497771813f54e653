"""Worker of test_collectives.py: training runs whose ranks hold text, images or both.

Arguments: a folder for the records (``RUN/rank0.pickle``, ...), then configurations.  The records
of ``planted-...`` are not of runs: their ranks do not do the same, which Gloo does not mind.

Only the batches are made by hand, and gradients are reduced during the backward pass, as on GPUs.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.evaluation.collective_recorder import CollectiveRecorder
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.device import Device
from moiie_megatron.mcore.dist_env import dist_env_from
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.run import run_sequentially
from moiie_megatron.training import run as training_run
from moiie_megatron.training import state as training_state
from moiie_megatron.training.loop import train
from moiie_megatron.vlm import build as vlm_build

IMAGE_TOKENS = 16
# What two data-parallel ranks hold, by step and micro-batch; a rank alone has the first's.
SCHEDULE = (
    (("text", "images"), ("images", "text")),
    (("mixed", "text"), ("text", "mixed")),
    (("text", "text"), ("text", "text")),
)
LENGTHS = {"text": 24, "images": 36, "mixed": 48}


def batch(kind: str, config: RunConfig, seed: int) -> Batch:
    """Random tokens: text alone, hardly anything but images, or samples of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = config.micro_batch_shape
    if config.data.padding == "longest":
        length = LENGTHS[kind]
    tokens = torch.randint(5, 150, (rows, length), generator=generator)
    types = torch.zeros(rows, length, dtype=torch.int8)
    if kind == "images":
        types[:, 1 : 1 + 2 * IMAGE_TOKENS] = IMAGE
    elif kind == "mixed":
        types[0, 1 : 1 + IMAGE_TOKENS] = IMAGE
    count = int((types == IMAGE).sum()) // IMAGE_TOKENS
    images = torch.randint(0, 256, (count, 3, 28, 28), generator=generator, dtype=torch.uint8)
    labels = tokens.roll(-1, dims=1).masked_fill(types != 0, -100)
    positions, cu_seqlens = torch.arange(length).repeat(rows, 1), None
    if config.data.packing:  # two samples in the row, with images in one of them or none
        first = length - 10
        positions[0, first:] -= first
        cu_seqlens = torch.tensor([0, first, length], dtype=torch.int32)
    return Batch(
        tokens, labels, positions, types, images, IMAGE_TOKENS, ("a",) * rows, (), cu_seqlens
    )


def batches(config: RunConfig, context: ParallelContext) -> Iterator[list[Batch]]:
    """This rank's micro-batches, step by step."""
    for step, ranks in enumerate(SCHEDULE):
        kinds = ranks[context.dp_rank % len(ranks)]
        if config.parallel.virtual_pipeline > 1:  # enough for the steady state of the schedule
            kinds *= 2
        yield [batch(kind, config, 10 * step + j) for j, kind in enumerate(kinds)]


def as_on_gpus(original: Callable[..., Any]) -> Callable[..., Any]:
    """Reductions that overlap with the backward pass, of several buckets."""

    def ddp_config(*args: Any) -> Any:
        return replace(original(*args), overlap_grad_reduce=True, bucket_size=20_000)

    return ddp_config


def batched_as_on_gpus(original: Callable[..., Any]) -> Callable[..., Any]:
    """Sends and receives of a pipeline in batches, unless the run is named ...one-by-one.

    Those of virtual stages are always apart, on GPUs too.
    """

    def transformer_config(config: RunConfig, device: Device) -> Any:
        result = original(config, device)
        one_by_one = result.overlap_p2p_comm or config.output.endswith("one-by-one")
        result.batch_p2p_comm = not one_by_one
        return result

    return transformer_config


class Records:
    """Writes what a rank has called, and how many calls torch's flight recorder has counted."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.seen = -1  # the last entry of the flight recorder

    def skip(self) -> None:
        """Leave what has been called so far out of the counts."""
        self._new()

    def _new(self) -> list[dict[str, Any]]:
        trace = pickle.loads(_dump_fr_trace(includeStackTraces=False))
        entries = [e for e in trace.get("entries", []) if e["record_id"] > self.seen]
        self.seen = max((e["record_id"] for e in entries), default=self.seen)
        return entries

    def write(self, name: str, recorder: CollectiveRecorder) -> None:
        counted = Counter(e["process_group"][0] for e in self._new())
        file = self.folder / name / f"rank{self.rank}.pickle"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps((recorder.events, counted)))


def plant(rank: int, records: Records) -> None:
    """What Gloo lets pass: another dtype, another order, and a call that one rank skips."""
    kind = torch.int32 if rank else torch.float32
    with CollectiveRecorder() as recorder:
        dist.all_gather_single(torch.empty(8, dtype=kind), torch.ones(4, dtype=kind))
    records.write("planted-dtype", recorder)
    pair = [torch.ones(4), torch.ones(2, 2)]
    with CollectiveRecorder() as recorder:
        works = [dist.all_reduce(t, async_op=True) for t in (pair[::-1] if rank else pair)]
        for work in works:
            work.wait()
    records.write("planted-order", recorder)
    with CollectiveRecorder() as recorder:
        dist.barrier()
        if rank == 0:
            dist.all_reduce(pair[0])
    records.write("planted-skipped", recorder)
    if rank == 1:  # so that rank 0 can go on
        dist.all_reduce(pair[0])


def main() -> None:
    out, *files = sys.argv[1:]
    os.environ["TORCH_FR_BUFFER_SIZE"] = "100000"  # read with the first collective
    launch = dist_env_from(os.environ)
    records = Records(Path(out), launch.rank)
    training_state.ddp_config = as_on_gpus(training_state.ddp_config)
    vlm_build.transformer_config = batched_as_on_gpus(vlm_build.transformer_config)

    def body(config: RunConfig, context: ParallelContext) -> None:
        training_run.build_train_loader = lambda *_, **__: batches(config, context)
        if launch.world_size == 2 and records.seen < 0:
            plant(launch.rank, records)
        records.skip()
        with CollectiveRecorder() as recorder:
            train(config, context)
        records.write(Path(config.output).name, recorder)

    run_sequentially([load_config(file) for file in files], launch, body)


if __name__ == "__main__":
    main()
