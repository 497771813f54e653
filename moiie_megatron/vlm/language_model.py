"""Megatron's GPTModel, computing logits for tokens with a label only.

Image tokens, questions and padding have no label: most tokens of visual instruction data.
Training skips them in the output layer, which is the largest product and the largest activation
of a small or large-vocabulary model.

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from moiie_megatron.mcore.patches.output_layer import (
    HAS_APEX_EXTENSION,
    built_without_apex,
    expect_gathered_input,
    keep_gradient_apart,
)
from moiie_megatron.mcore.patches.recompute import pass_token_types_to_all_layers


class LanguageModel(GPTModel):
    """GPTModel whose argument ``loss_mask`` is not a mask but the positions of the labels.

    ``forward`` takes them as ``loss_mask``, int64 ``(y,)`` into the flattened ``(s, b)``, and the
    labels at these positions as ``labels``, ``(1, y)``; it returns their losses, ``(1, y)``, or
    without labels the logits at the positions, ``(1, y, vocabulary)``.  Without ``loss_mask`` it
    returns logits of all tokens, as GPTModel does.

    Megatron passes ``loss_mask`` unchanged to ``_postprocess``, where the logits are computed,
    and uses it for multi-token prediction only, which the project does not support.

    Args:
        num_tokens: Rows of the embedding table that are tokens; those behind them
            (``layout/vocabulary.py``) have no logits and no part in a loss.

    Other arguments are GPTModel's.
    """

    def __init__(self, *args: Any, num_tokens: int, **kwargs: Any) -> None:
        self.num_tokens = num_tokens
        with built_without_apex():
            super().__init__(*args, **kwargs)
        pass_token_types_to_all_layers(self.decoder)
        if self.post_process and self.output_layer.sequence_parallel:
            # The sequence is gathered before tokens are selected, so the layer gets them whole.
            expect_gathered_input(self.output_layer)
        if self.post_process and not HAS_APEX_EXTENSION:
            keep_gradient_apart(self.output_layer)
        if self.pre_process:
            # Images are merged after it, and under sequence parallelism each rank would draw
            # its own mask for the whole sequence.
            self.embedding.embedding_dropout.p = 0.0

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        label_positions = loss_mask
        if self.post_process and self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        if self.post_process and label_positions is not None:
            labelled_yh = hidden_states.flatten(0, 1).index_select(0, label_positions)
            hidden_states = labelled_yh.unsqueeze(1)
        output: Tensor = super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        if self.post_process and labels is None:
            return output[..., : self.num_tokens]
        return output

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses of the labels; ``logits`` are this rank's part of the table's rows."""
        size = logits.shape[-1]
        tokens_here = self.num_tokens - size * self.pg_collection.tp.rank()
        if tokens_here < size:
            is_token = torch.arange(size, device=logits.device) < tokens_here
            logits = logits.masked_fill(~is_token, torch.finfo(logits.dtype).min)
        losses: Tensor = super().compute_language_model_loss(labels, logits)
        return losses
