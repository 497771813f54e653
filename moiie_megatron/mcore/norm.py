"""RMSNorm that supports sequence parallelism, for machines without Transformer Engine.

Megatron's ``WrappedTorchNorm`` refuses it.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` with the constructor that Megatron's specs call.

    Under sequence parallelism every rank sees a part of the sequence; the attribute
    ``sequence_parallel`` makes Megatron sum the weight's gradient over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
