"""The stand-in's attention and rotary embedding, through Transformer Engine's own interfaces."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

HEADS, GROUPS, SIZE = 4, 2, 8
LENGTHS = [5, 1, 6]


def attention(**options: object) -> DotProductAttention:
    return DotProductAttention(
        HEADS,
        SIZE,
        num_gqa_groups=GROUPS,
        attention_dropout=0.0,
        attn_mask_type="causal",
        **options,
    )


def states(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    heads = (HEADS, GROUPS, GROUPS)
    return [torch.randn(*shape, n, SIZE, generator=generator) for n in heads]


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """``(s, h, d)`` to ``(s, h d)``, from the definition."""
    output = torch.empty_like(q)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        for i in range(len(q)):
            seen = slice(max(0, i - window), i + 1)
            scores = k[seen, group] @ q[i, head] * scale
            output[i, head] = scores.softmax(0) @ v[seen, group]
    return output.flatten(1)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_sbhd(window: int | None, scale: float | None) -> None:
    options = {} if window is None else {"window_size": (window, 0)}
    module = attention(softmax_scale=scale, **options)
    q, k, v = states(6, 2)
    output = module(q, k, v, None, attn_mask_type="causal", qkv_format="sbhd")
    for row in range(2):
        want = written_out(
            *(x[:, row] for x in (q, k, v)),
            scale or 1 / math.sqrt(SIZE),
            99 if window is None else 2,
        )
        torch.testing.assert_close(output[:, row], want)


@pytest.mark.parametrize("window", [None, 2])
def test_thd(window: int | None) -> None:
    """Tokens see nothing of other segments."""
    options = {} if window is None else {"window_size": (window, 0)}
    q, k, v = states(sum(LENGTHS))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    output = attention(**options)(
        *(q, k, v, None),
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
        attn_mask_type="padding_causal",
    )
    parts = zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)
    limit = 99 if window is None else 2
    want = torch.cat([written_out(*part, 1 / math.sqrt(SIZE), limit) for part in parts])
    torch.testing.assert_close(output, want)


def test_arguments_are_transformer_engine_s() -> None:
    q, k, v = states(6, 2)
    with pytest.raises(TypeError, match="cu_seqlens"):
        attention()(q, k, v, None, cu_seqlens=None)
    with pytest.raises(NotImplementedError, match="no stand-in"):
        attention()(q, k, v, None, attn_mask_type="no_mask")


@pytest.mark.parametrize("layout", ["sbhd", "thd"])
def test_rotary_embedding(layout: str) -> None:
    """Its first channels are turned, in every segment from the start."""
    freqs = torch.randn(12, 1, 1, SIZE // 2 - 1).repeat(1, 1, 1, 2)
    x = torch.randn(*((6, 2) if layout == "sbhd" else (sum(LENGTHS),)), HEADS, SIZE)
    x.requires_grad_()
    if layout == "sbhd":
        got = apply_rotary_pos_emb(x, freqs, tensor_format="sbhd", fused=True)
        want = _apply_rotary_pos_emb_bshd(x, freqs[:6])
    else:
        ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        options = {"tensor_format": "thd", "cu_seqlens": ends, "cp_size": 1, "cp_rank": 0}
        got = apply_rotary_pos_emb(x, freqs, fused=True, **options)
        parts = [
            _apply_rotary_pos_emb_bshd(p.unsqueeze(1), freqs[: len(p)]) for p in x.split(LENGTHS)
        ]
        want = torch.cat(parts).squeeze(1)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad) for y in (got, want)))
