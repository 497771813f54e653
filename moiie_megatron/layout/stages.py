"""How many decoder layers each pipeline stage has, and which rank holds which layers.

With virtual stages a rank holds several stages, which Megatron calls model chunks: of the stages
in the order of the model, rank ``r`` of ``n`` holds numbers ``r``, ``r + n``, ``r + 2 n``, ...

Eight layers on two ranks with two virtual stages, and with ``[1, 2, 3, 2]`` layers:

    rank 0: layers 0-1, 4-5        rank 0: layers 0, 3-5
    rank 1: layers 2-3, 6-7        rank 1: layers 1-2, 6-7
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def layers_of_stages(
    num_layers: int, stages: int, given: Sequence[int] | None = None
) -> list[int] | None:
    """Layers of every stage, in order; None if the decoder cannot be divided so.

    Args:
        num_layers: Layers of the whole decoder.
        stages: Number of stages, virtual ones included.
        given: Layers of every stage; None for equally many.
    """
    if given is not None:
        fits = len(given) == stages and sum(given) == num_layers
        return list(given) if fits else None
    return None if num_layers % stages else [num_layers // stages] * stages


def layers_of_ranks(sizes: Sequence[int], ranks: int) -> list[list[range]]:
    """The layers (from 0) of every stage of every pipeline rank.

    Args:
        sizes: Layers of every stage, in order (``layers_of_stages``).
        ranks: Pipeline ranks.
    """
    ends = list(accumulate(sizes))
    stages = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [stages[rank::ranks] for rank in range(ranks)]


def describe_ranks(sizes: Sequence[int], ranks: int) -> list[str]:
    """What every pipeline rank holds, one line each.

    Args:
        sizes: Layers of every stage, in order (``layers_of_stages``).
        ranks: Pipeline ranks.
    """
    lines = []
    for rank, stages in enumerate(layers_of_ranks(sizes, ranks)):
        layers = ["-".join(dict.fromkeys([str(part[0]), str(part[-1])])) for part in stages]
        first = "vision encoder, connector, embedding, " if rank == 0 else ""
        last = ", output layer" if rank == ranks - 1 else ""
        lines.append(f"pipeline rank {rank}: {first}layers {', '.join(layers)}{last}")
    return lines
