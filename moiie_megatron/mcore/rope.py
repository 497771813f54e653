"""Rotary embeddings with scaled frequencies: ``llama3``, with any constants, and LongRoPE.

Megatron-Core's own ``llama3`` scaling hard-codes every constant but the factor, and it has no
LongRoPE.  The frequencies are those that transformers computes (``modeling_rope_utils.py``).

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moiie_megatron.config.schema import LanguageConfig


class ScaledRotaryEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding with given frequencies.

    Args:
        mconfig: Megatron's configuration of the language model.
        groups: Megatron's process groups.
        inv_freq: fp32 ``(d / 2,)``, radians per position.
        long_inv_freq: The same for sequences of more than ``switch`` positions.
        switch: Longest sequence that uses ``inv_freq``; None if every sequence does.
    """

    inv_freq: Tensor

    def __init__(
        self,
        mconfig: TransformerConfig,
        groups: ProcessGroupCollection,
        inv_freq: Tensor,
        long_inv_freq: Tensor,
        switch: int | None,
    ) -> None:
        super().__init__(
            kv_channels=mconfig.kv_channels,
            rotary_percent=1.0,
            rotary_interleaved=mconfig.rotary_interleaved,
            use_cpu_initialization=mconfig.use_cpu_initialization,
            cp_group=groups.cp,
        )
        assert inv_freq.shape == self.inv_freq.shape, (inv_freq.shape, self.inv_freq.shape)
        self.inv_freq = inv_freq.to(self.inv_freq.device)
        self.long_inv_freq = long_inv_freq
        self.switch = switch

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles ``(positions, d / 2)``, from which Megatron derives sines and cosines.

        Args:
            max_seq_len: Length of the whole sequence, not of this rank's part.
            offset: First position.
        """
        if self.switch is None or max_seq_len <= self.switch:
            return super().get_freqs_non_repeated(max_seq_len, offset)
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=torch.float32)
        return torch.outer(positions + offset, self.long_inv_freq.to(self.inv_freq.device))


def scaled_rotary_embedding(
    language: LanguageConfig, mconfig: TransformerConfig, groups: ProcessGroupCollection
) -> ScaledRotaryEmbedding | None:
    """The replacement of ``GPTModel.rotary_pos_emb``; None for unscaled RoPE.

    LongRoPE's attention factor is not included: Megatron's rotary embeddings are angles, so
    ``transformer_config`` puts it into the scale of the attention scores.
    """
    if language.rope_scaling is None and language.longrope is None:
        return None
    switch = None
    if language.longrope is not None:
        switch = language.longrope.original_max_position_embeddings
    short, long = (inverse_frequencies(language, length) for length in (1, (switch or 0) + 1))
    return ScaledRotaryEmbedding(mconfig, groups, short, long, switch)


def inverse_frequencies(language: LanguageConfig, sequence_length: int) -> Tensor:
    """The scaled frequencies for a sequence length, fp32 ``(d / 2,)`` on the CPU."""
    rope: dict[str, Any] = {"rope_theta": language.rotary_base}
    if language.longrope is not None:
        rope |= {"rope_type": "longrope", **language.longrope.model_dump()}
    else:
        assert language.rope_scaling is not None
        rope |= {"rope_type": "llama3", **language.rope_scaling.model_dump()}
    # transformers reads only the RoPE fields of the configuration, so any family's class does.
    kind: Any = PreTrainedConfig  # takes any attribute
    config = kind(
        head_dim=language.head_size,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        max_position_embeddings=language.max_position_embeddings,
        rope_parameters=rope,
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](
        config, torch.device("cpu"), seq_len=sequence_length
    )
    return frequencies
