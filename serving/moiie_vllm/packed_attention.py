"""Attention whose queries, keys and values are the product of one matrix, in several processes.

vLLM's Transformers backend divides such attention (Phi-3's) only where the product is split in one
call; where it is sliced, every process would compute all heads, and vLLM expects its own only.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization import QuantizationConfig


def divide_packed_attention(
    model: nn.Module, num_processes: int, quant_config: QuantizationConfig | None
) -> None:
    """Give each process its heads of every ``qkv_proj`` in a model, and of its ``o_proj``.

    The attention slices the product at the numbers of heads in its ``config`` and in
    ``num_key_value_heads``: both become those of one process.
    """
    for name, attention in model.named_modules():
        packed = getattr(attention, "qkv_proj", None)
        if not isinstance(packed, nn.Linear):
            continue
        config = copy.copy(attention.config)
        own = QKVParallelLinear(
            hidden_size=packed.in_features,
            head_size=attention.head_dim,
            total_num_heads=config.num_attention_heads,
            total_num_kv_heads=config.num_key_value_heads,
            bias=packed.bias is not None,
            quant_config=quant_config,
            prefix=f"model.{name}.qkv_proj",
            return_bias=False,
        )
        output = attention.o_proj
        attention.o_proj = RowParallelLinear(
            input_size=output.in_features,
            output_size=output.out_features,
            bias=output.bias is not None,
            quant_config=quant_config,
            prefix=f"model.{name}.o_proj",
            return_bias=False,
        )
        attention.qkv_proj = own
        config.num_attention_heads //= num_processes
        config.num_key_value_heads = attention.num_key_value_heads = own.num_kv_heads
        attention.config = config
