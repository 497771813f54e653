"""Rows of tokens sorted by expert, and back: ``pytorch/triton/permutation.py``, without Triton.

The map of a routing has a line per token: the rows that its copies go to, the experts of these
rows, and their number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """``(tokens, 2 experts + 1)``; rows are sorted by expert, then by token."""
    experts, tokens = routing_map.bool().t().nonzero(as_tuple=True)
    order = tokens.argsort(stable=True)  # rows in the order of their tokens
    counts = tokens.bincount(minlength=num_tokens)
    before = (counts.cumsum(0) - counts)[tokens[order]]
    slots = torch.arange(len(order)) - before
    row_id_map = torch.full((num_tokens, 2 * num_experts + 1), -1, dtype=torch.int32)
    row_id_map[tokens[order], slots] = order.int()
    row_id_map[tokens[order], num_experts + slots] = experts[order].int()
    row_id_map[:, -1] = counts
    return row_id_map


def _copies(row_id_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and row of every copy."""
    num_experts = row_id_map.shape[1] // 2
    used = torch.arange(num_experts) < row_id_map[:, -1:]
    rows = row_id_map[:, :num_experts][used]
    experts = row_id_map[:, num_experts:-1][used]
    return used.nonzero(as_tuple=True)[0], experts.long(), rows.long()


def permute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    scale: Any,
    pad_offsets: Any,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
    scale_hidden_dim: Any,
) -> tuple[Tensor, None, Tensor | None]:
    """The rows, no scales, and the probability of every row."""
    _only_plain(scale, pad_offsets)
    tokens, experts, rows = _copies(row_id_map)
    output = inp.new_empty(num_out_tokens, hidden_size).index_copy(0, rows, inp[tokens])
    if probs is None:
        return output, None, None
    chosen = probs.new_empty(num_out_tokens).index_copy(0, rows, probs[tokens, experts])
    return output, None, chosen


def unpermute_with_mask_map(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None,
    permuted_probs: Tensor | None,
    pad_offsets: Any,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
) -> tuple[Tensor, Tensor | None]:
    """The sum of a token's rows, in fp32, and the probabilities ``(tokens, experts)``."""
    _only_plain(pad_offsets)
    tokens, experts, rows = _copies(row_id_map)
    values = inp[rows].float()
    if merging_probs is not None:
        values = values * merging_probs[tokens, experts].float().unsqueeze(1)
    output = torch.zeros(num_tokens, hidden_size).index_add(0, tokens, values).to(inp.dtype)
    if permuted_probs is None:
        return output, None
    probs = permuted_probs.new_zeros(num_tokens, num_experts)
    probs[tokens, experts] = permuted_probs[rows]
    return output, probs


def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad: Tensor,
    row_id_map: Tensor,
    fwd_input: Tensor,
    merging_probs: Tensor,
    pad_offsets: Any,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the probabilities."""
    _only_plain(pad_offsets)
    tokens, experts, rows = _copies(row_id_map)
    grads = fwd_output_grad[tokens].float()
    scaled = grads * merging_probs[tokens, experts].float().unsqueeze(1)
    rows_grad = fwd_output_grad.new_empty(num_out_tokens, hidden_size)
    rows_grad[rows] = scaled.to(rows_grad.dtype)
    probs_grad = torch.zeros_like(merging_probs)
    probs_grad[tokens, experts] = (grads * fwd_input[rows].float()).sum(1).to(probs_grad.dtype)
    return rows_grad, probs_grad


def make_chunk_sort_map(
    split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int
) -> Tensor:
    """Where every row goes when the chunks are put into another order."""
    chunks = torch.arange(num_tokens).split(split_sizes.tolist())
    sources = torch.cat([chunks[index] for index in sorted_indices.tolist()])
    return sources.argsort().int()


def sort_chunks_by_map(
    inp: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    num_tokens: int,
    hidden_size: int,
    is_forward: bool,
) -> tuple[Tensor, Tensor | None]:
    """The rows, and their probabilities, moved to their places or back."""
    places = row_id_map.long()
    places = places.argsort() if is_forward else places
    return inp[places], None if probs is None else probs[places]


def _only_plain(*values: Any) -> None:
    if any(value is not None for value in values):
        raise NotImplementedError("Permuting FP8 or padded rows has no stand-in.")


FUNCTIONS = (
    make_row_id_map,
    permute_with_mask_map,
    unpermute_with_mask_map,
    unpermute_with_mask_map_bwd_with_merging_probs,
    make_chunk_sort_map,
    sort_chunks_by_map,
)
