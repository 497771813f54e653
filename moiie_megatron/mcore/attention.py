"""Core attention on torch's fused kernel, for machines without Transformer Engine.

Megatron-Core's local ``DotProductAttention`` materialises the s x s scores; torch's
``scaled_dot_product_attention`` does not, on CPU and GPU alike.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.mcore.packed_sequences import Segments


class SDPACoreAttention(MegatronModule):
    """Causal self-attention, optionally within a sliding window, in packed rows, with dropout.

    The constructor takes the arguments that Megatron's ``SelfAttention`` passes
    (``transformer/attention.py``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(d)
        self.window = config.window_size[0] + 1 if config.window_size else None
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Segments | None = None,
    ) -> Tensor:
        """Attention of every query to the keys at and before its position.

        Padding is on the right, so the causal mask also hides it from real tokens.  In a packed
        row, which has no axis b, every segment attends to itself only, and the cost is that of
        the segments, not of the row.

        Args:
            query: ``(s, b, n, d)``, packed ``(s, n, d)``.
            key: ``(s, b, g, d)``, packed ``(s, g, d)``.
            value: ``(s, b, g, d)``, packed ``(s, g, d)``.
            packed_seq_params: The segments of a packed row; their lengths add up to s.

        Returns:
            ``(s, b, n * d)``, packed ``(s, n * d)``.
        """
        # Tensor-parallel ranks hold different heads, which need different dropout masks.  Under
        # sequence parallelism Megatron's TransformerBlock has switched the generator already.
        apart = self.training and self.dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if apart else nullcontext():
            return self._attend(query, key, value, packed_seq_params)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: Segments | None
    ) -> Tensor:
        if packed_seq_params is None:
            return self._causal(query, key, value)
        lengths = list(packed_seq_params.lengths)
        parts = (tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value))
        return torch.cat([self._causal(*part) for part in zip(*parts, strict=True)]).squeeze(1)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(
            query,
            key,
            value,
            window=self.window,
            scale=self.softmax_scale,
            dropout=self.dropout if self.training else 0.0,
        )


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    scale: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of every query to the keys at and before its position.

    Args:
        query: ``(s, b, n, d)``.
        key: ``(s, b, g, d)``.
        value: ``(s, b, g, d)``.
        window: Positions that a query sees, its own included; None for all before it.
        scale: Factor on the scores; None for ``1 / sqrt(d)``.
        dropout: Probability.

    Returns:
        ``(s, b, n * d)``.
    """
    s, b, n, d = query.shape
    mask = None
    if window is not None and s > window:
        position = torch.arange(s, device=query.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
    out_bnsd = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=key.shape[2] != n,
    )
    return out_bnsd.permute(2, 0, 1, 3).reshape(s, b, n * d)
