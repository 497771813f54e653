"""What is reported about routing: counts over some steps, and what follows from them.

One record is one JSON object (a line of ``routing.jsonl``) that explains itself:

    version      1; readers refuse others
    experts      names by logical id, in the order of every list "by expert": vision.0, shared.0
    top_k        experts per token
    ranks        logical ids of the experts that each expert-parallel rank holds
    layers       by layer number (from 0, as text):
        vision, text   image tokens, text tokens (never padding):
            tokens         how many
            load           how many of them each expert got; adds up to top_k * tokens
            fraction       load / tokens (``share`` in older files)
            prob           mean routing probability, the router's softmax before top-k
            entropy        of the load over the experts that the modality may use, divided by its
                           maximum: 1 is even, 0 one expert; null without tokens
            rows           rows that the dispatcher exchanged between expert-parallel ranks
            remote_rows    those of them that went to another rank
        padding        rows and remote_rows of padding tokens, which travel like text
        rank_load      tokens times experts that each expert-parallel rank computed
        max_over_mean  of rank_load; null without tokens
        dead           logical ids of experts that no token chose although some could have
    row_bytes    bytes of one row: there and back in the forward pass, again in the backward
                 pass (without the exchange that recomputation repeats)
    moved        vision, text, padding: rows, remote_rows and bytes (remote_rows * row_bytes),
                 summed over layers

Training adds ``step`` and ``steps``: the record covers the ``steps`` steps up to ``step``.
To join records, add up their counts and weight their means with ``tokens``.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moiie_megatron.layout.experts import ExpertLayout
from moiie_megatron.layout.placement import Placement
from moiie_megatron.layout.token_types import MODALITIES
from moiie_megatron.routing_stats.load_stats import LayerSums
from moiie_megatron.routing_stats.version import VERSION

_DIGITS = 9  # after the point; means are sums of fp32 numbers


def routing_record(
    layers: Mapping[int, LayerSums], layout: ExpertLayout, placement: Placement, row_bytes: int
) -> dict[str, Any]:
    """The record of some steps or samples, as the head of this file describes it.

    Args:
        layers: Sums over all ranks by layer number (from 0).
        row_bytes: Bytes of one row between two ranks (``counters.row_bytes``).
    """
    size = layout.num_experts // placement.ep_size
    starts = range(0, layout.num_experts, size)
    ranks = [list(placement.physical_to_logical[start : start + size]) for start in starts]
    return {
        "version": VERSION,
        "experts": [layout.name(expert) for expert in range(layout.num_experts)],
        "top_k": layout.top_k,
        "ranks": ranks,
        "layers": {str(n): _layer(sums, layout, ranks) for n, sums in layers.items()},
        "row_bytes": row_bytes,
        "moved": {
            kind: _moved(list(layers.values()), kind, row_bytes)
            for kind in (*MODALITIES, "padding")
        },
    }


def load_entropy(load: Sequence[float]) -> float | None:
    """Entropy of a load over experts, divided by its maximum ``log(len(load))``.

    None if the load is zero.
    """
    total = sum(load)
    if not total:
        return None
    fractions = [part / total for part in load if part]
    # Minus zero would be written as such.
    entropy = abs(sum(fraction * math.log(fraction) for fraction in fractions))
    return entropy / math.log(len(load)) if len(load) > 1 else 1.0


def max_over_mean(loads: Sequence[float]) -> float | None:
    """Largest load over the mean; None without load."""
    return max(loads) * len(loads) / sum(loads) if any(loads) else None


def dead_experts(sums: LayerSums, layout: ExpertLayout) -> list[int]:
    """Experts that no token chose although a modality that may use them had tokens."""
    reachable: set[int] = set()
    for tokens, modality in zip(sums.tokens_M, MODALITIES, strict=True):
        if tokens:
            reachable.update(layout.allowed(modality))
    return sorted(expert for expert in reachable if not any(load[expert] for load in sums.load_ME))


def _layer(sums: LayerSums, layout: ExpertLayout, ranks: Sequence[Sequence[int]]) -> dict[str, Any]:
    rows, remote = _of(sums.rows_A), _of(sums.remote_A)
    total = [sum(of_expert) for of_expert in zip(*sums.load_ME, strict=True)]
    rank_load = [sum(total[expert] for expert in rank) for rank in ranks]
    layer: dict[str, Any] = {}
    for number, modality in enumerate(MODALITIES):
        tokens, load = sums.tokens_M[number], list(sums.load_ME[number])
        count = max(tokens, 1)
        layer[modality] = {
            "tokens": tokens,
            "load": load,
            "fraction": [round(part / count, _DIGITS) for part in load],
            "prob": [round(part / count, _DIGITS) for part in sums.prob_ME[number]],
            "entropy": _rounded(load_entropy([load[e] for e in layout.allowed(modality)])),
            "rows": rows[modality],
            "remote_rows": remote[modality],
        }
    return layer | {
        "padding": {"rows": rows["padding"], "remote_rows": remote["padding"]},
        "rank_load": rank_load,
        "max_over_mean": _rounded(max_over_mean(rank_load)),
        "dead": dead_experts(sums, layout),
    }


def _moved(layers: Sequence[LayerSums], kind: str, row_bytes: int) -> dict[str, int]:
    rows = sum(_of(sums.rows_A)[kind] for sums in layers)
    remote = sum(_of(sums.remote_A)[kind] for sums in layers)
    return {"rows": rows, "remote_rows": remote, "bytes": remote * row_bytes}


def _of(counts: Sequence[int]) -> dict[str, int]:
    """By kind of token; the last count is that of all tokens."""
    *modalities, everything = counts
    by_kind: dict[str, int] = dict(zip(MODALITIES, modalities, strict=True))
    return {**by_kind, "padding": everything - sum(modalities)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
