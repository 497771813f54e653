"""Megatron's GPTModel, with logits only where there is something to learn.

Image tokens, questions and padding have no label: most tokens of visual instruction data.  Their
rows of the output layer, the largest product and the largest activation of a small or
large-vocabulary model, are left out of training.

Shapes: b batch, s sequence, h hidden, n tokens with a label.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


class LanguageModel(GPTModel):
    """``forward`` takes the places of the labels, int64 ``(n,)`` in ``(s, b)`` order, as
    ``loss_mask`` and the labels there as ``(1, n)``; it returns their losses ``(1, n)``.

    Megatron hands ``loss_mask`` through untouched to where the logits are computed (and uses it
    for multi-token prediction alone).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process and self.output_layer.sequence_parallel:
            # The sequence is put together before rows are chosen.  What the layer would have
            # scattered in backward it sums over the tensor-parallel ranks, for fewer rows.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = True

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, loss_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if self.post_process and self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        if self.post_process and loss_mask is not None:
            hidden_states = hidden_states.flatten(0, 1).index_select(0, loss_mask).unsqueeze(1)
        result: Tensor = super()._postprocess(hidden_states, *args, **kwargs)
        return result
