"""Attention: torch's own in place of the kernels that Transformer Engine chooses among."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def replace_forward(cls: Any) -> None:
    """Let a ``DotProductAttention`` compute with torch.

    Arguments are bound to the signature of the method that is replaced, so a name that
    Transformer Engine does not know is an error here too.
    """
    signature = inspect.signature(cls.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(self, *args, **kwargs).arguments
        return _attention(self, **{k: v for k, v in bound.items() if k != "self"})

    cls.forward = forward


def _attention(
    module: Any,
    query_layer: Tensor,
    key_layer: Tensor,
    value_layer: Tensor,
    attention_mask: Tensor | None = None,
    qkv_format: str | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    attn_mask_type: str | None = None,
    window_size: tuple[int, int] | None = None,
    **others: Any,
) -> Tensor:
    """``sbhd``: ``(s, b, h, d)`` to ``(s, b, h d)``; ``thd``: ``(t, h, d)`` to ``(t, h d)``."""
    unknown = {name: value for name, value in others.items() if value is not None}
    if unknown or attention_mask is not None or module.attention_dropout:
        raise NotImplementedError(f"Attention with {unknown} or a mask has no stand-in.")
    window = window_size or module.window_size
    mask_type = attn_mask_type or module.attn_mask_type
    states = (query_layer, key_layer, value_layer)
    if (qkv_format or module.qkv_format) == "sbhd":
        if mask_type != "causal":
            raise NotImplementedError(f"The mask {mask_type} of sbhd has no stand-in.")
        one = _causal(module, *(x.permute(1, 2, 0, 3) for x in states), window=window)
        return one.permute(2, 0, 1, 3).flatten(2)
    if qkv_format != "thd" or mask_type != "padding_causal":
        raise NotImplementedError(f"The mask {mask_type} of {qkv_format} has no stand-in.")
    assert cu_seqlens_q is not None and cu_seqlens_kv is not None
    assert torch.equal(cu_seqlens_q, cu_seqlens_kv), "causal attention to other tokens"
    assert cu_seqlens_q.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert sum(lengths) == len(query_layer), "the segments are not the row"
    assert max_seqlen_q == max_seqlen_kv == max(lengths), "the longest segment"
    outputs = [
        _causal(module, *(x.transpose(0, 1).unsqueeze(0) for x in segment), window=window)
        for segment in zip(*(x.split(lengths) for x in states), strict=True)
    ]
    return torch.cat([one.squeeze(0).transpose(0, 1) for one in outputs]).flatten(1)


def _causal(
    module: Any, query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int]
) -> Tensor:
    """All ``(b, h, s, d)``; a token sees ``window[0]`` tokens before itself, -1 for all."""
    mask = None
    if window[0] >= 0:
        length = query.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool).tril().triu(-window[0])
    scale = module.flash_attention.softmax_scale  # where the constructor has put it
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
