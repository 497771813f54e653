"""The packed rows of a step, from the samples that the data-parallel ranks have read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moiie_megatron.data.packing.deal_rows import deal_rows
from moiie_megatron.data.packing.exchange_samples import DataParallelRanks, exchange_samples
from moiie_megatron.data.packing.rows import PackingSpec, pack_row
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import Example


def pack(
    examples: Sequence[Example],
    spec: PackingSpec,
    ranks: DataParallelRanks | None = None,
    rows_multiple_of: int = 1,
) -> list[Batch]:
    """This rank's rows of a step, each a micro-batch; with ``ranks``, every rank calls this.

    The samples of all ranks are packed together, and move to the rank whose row they are in.

    Args:
        examples: What this rank has read, equally many on every rank, none longer than
            ``spec.capacity``.
        spec: What all rows have in common.
        ranks: The data-parallel ranks; None packs the samples of one rank alone.
        rows_multiple_of: The rows of a rank are a multiple of this, unless they are one per
            sample.
    """
    ranks = None if ranks is None or ranks.dp_size == 1 else ranks
    sizes = torch.tensor([[len(one.encoded.tokens), len(one.images)] for one in examples])
    if ranks is not None:
        sizes = ranks.gather_over_dp(sizes).flatten(0, 1)
    lengths, images = sizes.t().tolist()
    plan = deal_rows(
        lengths,
        images,
        num_ranks=1 if ranks is None else ranks.dp_size,
        capacity=spec.capacity,
        num_image_tokens=spec.num_image_tokens,
        rows_multiple_of=rows_multiple_of,
    )
    if ranks is None:
        return [pack_row([examples[i] for i in row], spec) for row in plan[0]]
    return [pack_row(row, spec) for row in exchange_samples(examples, plan, ranks)]
