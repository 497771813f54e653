"""Megatron's self-attention, with a key-value cache whose rows have different lengths.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from moiie_megatron.mcore.inference.cache import KeyValueCache


class CachedSelfAttention(SelfAttention):
    """``SelfAttention``, which does as Megatron's without a ``KeyValueCache``."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        inference_context: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the tokens of the pass and those in the cache.

        Args:
            hidden_states: ``(s, 1, h)``, the tokens of ``inference_context``'s pass; s is this
                rank's part under sequence parallelism.
            inference_context: A ``KeyValueCache``, which has the positions and masks; with
                anything else this is Megatron's method.

        Returns:
            ``(s, 1, h)`` and the bias, if there is one.
        """
        if not isinstance(inference_context, KeyValueCache):
            output: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states,
                attention_mask,
                *args,
                inference_context=inference_context,
                **kwargs,
            )
            return output
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        query, key = inference_context.rotate(query, key)
        attended = inference_context.attend(
            self.layer_number, query, key, value, self.config.softmax_scale
        )
        projected, bias = self.linear_proj(attended)
        return projected, bias
