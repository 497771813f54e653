"""Packed rows: every segment computes what it would compute alone."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from moiie_megatron.mcore.attention import SDPACoreAttention
from moiie_megatron.mcore.packed_sequences import Segments, segments_of
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.rope import ScaledRotaryEmbedding

LENGTHS = (5, 1, 9, 2)
HEADS, SIZE = 4, 8


def segments(context: ParallelContext, lengths: tuple[int, ...] = LENGTHS) -> Segments:
    return segments_of(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), context.device)


def config(**changes: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HEADS * SIZE,
        "num_attention_heads": HEADS,
    }
    return TransformerConfig(
        **values, use_cpu_initialization=True, attention_dropout=0.0, **changes
    )


def dense_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Attention of one segment, written out: ``(s, n, d)`` and ``(s, g, d)`` to ``(s, n, d)``."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = torch.einsum("snd,tnd->nst", query, key) / query.shape[2] ** 0.5
    distance = torch.arange(len(query))[:, None] - torch.arange(len(key))[None, :]
    visible = (distance >= 0) & (distance < (window or len(query)))
    return torch.einsum("nst,tnd->snd", scores.where(visible, -1e9).softmax(-1), value)


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("window", [None, 3])
def test_segments_do_not_see_each_other(
    context: ParallelContext, groups: int, window: int | None
) -> None:
    torch.manual_seed(2)
    total = sum(LENGTHS)
    tensors = [torch.randn(total, heads, SIZE) for heads in (HEADS, groups, groups)]
    upstream = torch.randn(total, HEADS * SIZE)
    mconfig = config(window_size=None if window is None else (window - 1, 0))
    attention = SDPACoreAttention(mconfig, 1, AttnMaskType.causal, "self")

    packed = [tensor.clone().requires_grad_() for tensor in tensors]
    out = attention(*packed, packed_seq_params=segments(context))
    out.backward(upstream)

    alone = [tensor.clone().requires_grad_() for tensor in tensors]
    parts = zip(*(tensor.split(LENGTHS) for tensor in alone), strict=True)
    wanted = torch.cat([dense_attention(*part, window) for part in parts]).flatten(1)
    wanted.backward(upstream)

    assert torch.allclose(out, wanted, atol=1e-6)
    for got, tensor in zip(packed, alone, strict=True):
        assert torch.allclose(got.grad, tensor.grad, atol=1e-6)


def test_one_segment_is_the_plain_row(context: ParallelContext) -> None:
    torch.manual_seed(3)
    query, key, value = (torch.randn(7, heads, SIZE) for heads in (HEADS, 2, 2))
    attention = SDPACoreAttention(config(), 1, AttnMaskType.causal, "self")
    plain = attention(*(tensor.unsqueeze(1) for tensor in (query, key, value)))
    packed = attention(query, key, value, packed_seq_params=segments(context, (7,)))
    assert torch.equal(packed, plain.squeeze(1))


@pytest.mark.parametrize("lengths", [LENGTHS, (17,)])
def test_positions_begin_anew_in_every_segment(
    context: ParallelContext, lengths: tuple[int, ...]
) -> None:
    """Through Megatron's ``thd`` path, with our rotary embedding."""
    torch.manual_seed(4)
    query = torch.randn(sum(lengths), HEADS, SIZE)
    frequencies = 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    rope = ScaledRotaryEmbedding(config(), context.groups, frequencies, frequencies * 2, 20)
    packed = segments(context, lengths)
    assert packed.lengths == lengths
    seen = rope.get_rotary_seq_len(None, None, query, config(), packed)
    assert seen == max(lengths)
    turned = apply_rotary_pos_emb(
        query, rope(seen), config(), cu_seqlens=packed.cu_seqlens_q, cp_group=context.groups.cp
    )
    for part, before in zip(turned.split(lengths), query.split(lengths), strict=True):
        angles = torch.outer(torch.arange(len(part)), frequencies)
        cos, sin = (f(angles).repeat(1, 2).unsqueeze(1) for f in (torch.cos, torch.sin))
        first, second = before.chunk(2, dim=-1)
        wanted = before * cos + torch.cat([-second, first], dim=-1) * sin
        assert torch.allclose(part, wanted, atol=1e-6)
