"""Record how a trained model routes the samples of a data set, without training it.

The input is the complete conversation, answers included, as in training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.batch import Batch, collate
from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.data.stream.example import Example, filler
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.router import recording
from moiie_megatron.routing_stats.counters import RoutingCounters
from moiie_megatron.training.step import run_schedule
from moiie_megatron.utils.errors import UserError
from moiie_megatron.vlm.model import MoIIEModel


@torch.no_grad()
def measure_routing(
    config: RunConfig,
    context: ParallelContext,
    model: MoIIEModel,
    dataset: LlavaDataset,
    samples: int,
) -> dict[str, Any] | None:
    """Route the first samples of a data set; every rank calls this.

    Args:
        config: ``train.micro_batch_size`` samples make one forward pass of a rank.
        model: Left in evaluation mode.
        samples: How many; at most all are read.

    Returns:
        On rank 0 a record of ``routing_stats/record.py``, with ``samples`` that were routed and
        ``skipped_samples`` that could not be read; None on other ranks.

    Raises:
        UserError: The model has no experts, or no sample could be read.
    """
    if not config.moe_layers:
        raise UserError(f"The model of stage {config.stage.name} is dense: it routes nothing.")
    model.eval()
    counters = RoutingCounters(config, context, model)
    counts = torch.zeros(2, dtype=torch.int64)  # samples read, samples that could not be read
    # Without packing: other rows than in training, the same tokens.
    unpacked = config.model_copy(update={"data": config.data.model_copy(update={"packing": False})})
    size, samples = config.train.micro_batch_size, min(samples, len(dataset))
    # Every rank makes the same number of passes: dispatchers wait for all ranks.
    with recording(model):
        for start in range(0, samples, size * context.dp_size):
            first = start + context.dp_rank * size
            examples, bad = _read(dataset, range(first, min(first + size, samples)))
            counts += torch.tensor([len(examples), bad])
            batch = _batch(config, dataset, examples)
            run_schedule(unpacked, context, [model], [batch], loss_scale=1.0, forward_only=True)
    counts = counts.to(context.device.torch_device)
    dist.all_reduce(counts, group=context.groups.dp)
    read, bad = counts.tolist()
    if not read:
        raise UserError(f"None of the first {samples} samples can be read: check the data.")
    record = counters.record()
    if record is None:
        return None
    del record["steps"]  # there were none
    return {**record, "samples": read, "skipped_samples": bad}


def _read(dataset: LlavaDataset, indices: range) -> tuple[list[Example], int]:
    examples, bad = [], 0
    for index in indices:
        try:
            examples.append(dataset[index])
        except BadRecord:
            bad += 1
    return examples, bad


def _batch(config: RunConfig, dataset: LlavaDataset, examples: list[Example]) -> Batch:
    """The examples as one batch, filled up with rows of padding to the size of a micro-batch.

    Padding is not counted; some dispatchers need the same number of tokens on all ranks.
    """
    parallel = config.parallel
    full = config.data.sequence_length if config.data.padding == "sequence_length" else None
    return collate(
        [
            *examples,
            *[filler(dataset.pad_id, dataset.image_size)]
            * (config.train.micro_batch_size - len(examples)),
        ],
        pad_id=dataset.pad_id,
        num_image_tokens=dataset.num_image_tokens,
        pad_to=full,
        multiple_of=parallel.tensor if parallel.sequence_parallel else 1,
    )
