"""An exported MoIIE model in vLLM, on top of vLLM's Transformers backend.

The backend takes the modules of the exported code and replaces attention, linear layers and
experts by its own.  What it does not know is the modality of each token, which chooses the router.
A token is an image token where vLLM puts an image embedding.  Its id tells nothing: an image
placeholder that a user has typed or that the model has generated is text, as in transformers.

Shapes: T tokens of all requests of a step, N the most of them, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.compilation.decorators import DynamicArgDims
from vllm.model_executor.models.transformers import TransformersMultiModalMoEForCausalLM
from vllm.model_executor.models.transformers.base import Base
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.model_executor.models.transformers.utils import can_enable_torch_compile
from vllm.model_executor.models.utils import _merge_multimodal_embeddings
from vllm.multimodal import MULTIMODAL_REGISTRY

from moiie_vllm.packed_attention import divide_packed_attention
from moiie_vllm.supported import check

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.models.interfaces import MultiModalEmbeddings


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class MoiieForVllm(TransformersMultiModalMoEForCausalLM):
    """The model that vLLM runs for the architecture ``MoiieForConditionalGeneration``.

    vLLM calls ``embed_input_ids`` with the tokens of a step right before ``forward`` with their
    embeddings.  The mask of the first call is kept for the second in a buffer of fixed address, as
    CUDA graphs, which are recorded once, read it.

    Raises:
        ValueError: A model or a layout whose answers would be wrong (``moiie_vllm.supported``).
    """

    is_image: Tensor  # bool (1, N); not image: text, padding, and all tokens of a dummy step

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # No step is longer, padding included: vLLM's own buffer of embeddings has as many rows.
        longest = vllm_config.scheduler_config.max_num_batched_tokens
        device = vllm_config.device_config.device
        mask = torch.zeros(1, longest, dtype=torch.bool, device=device)
        self.register_buffer("is_image", mask, persistent=False)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embeddings ``(T, H)`` of a step, those of images at the positions of ``is_multimodal``.

        Args:
            input_ids: ``(T,)``.
            multimodal_embeddings: Of the images or the pieces of images in this step, in order.
            is_multimodal: Bool ``(T,)``, on the CPU or the device; None: all tokens are text.
        """
        self.is_image.zero_()
        if is_multimodal is not None:
            self.is_image[0, : len(is_multimodal)].copy_(is_multimodal, non_blocking=True)
        # A request may hold any id of the tokenizer, which may have more than the table.
        inside = input_ids.masked_fill(input_ids >= self.text_config.vocab_size, 0)
        embeds = Base.embed_input_ids(self, inside)
        if not multimodal_embeddings:
            return embeds
        assert is_multimodal is not None
        return _merge_multimodal_embeddings(embeds, multimodal_embeddings, is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Hidden states ``(T, H)``.

        Args:
            input_ids: ``(T,)``, used where there are no embeddings: a model without images.
            positions: ``(T,)``, each within its own request.
            intermediate_tensors: Of an earlier pipeline stage: there is none.
            inputs_embeds: ``(T, H)``, of ``embed_input_ids``, padded at the end.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        num_tokens = len(inputs_embeds)
        # Not through the whole model, which would compute the mask anew, at another address.
        outputs = self.model.language_model(
            inputs_embeds=inputs_embeds.unsqueeze(0),
            is_image=self.is_image[:, :num_tokens],
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            return_dict=False,
        )
        return outputs[0].squeeze(0)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Scores ``(T, V)`` of the vocabulary; those of tokens without training are -inf.

        None in the processes of tensor parallelism that do not sample.
        """
        logits = super().compute_logits(hidden_states)
        added = getattr(self.config, "num_added_tokens", 0)
        if logits is not None and added:
            last = self.config.image_token_id
            logits[..., last + 1 - added : last + 1] = float("-inf")
        return logits

    def recursive_replace(self) -> None:
        """Replace modules by vLLM's; a dense model has no experts to look for."""
        num_processes = self.tp_group.world_size
        if num_processes > 1:
            divide_packed_attention(self.model, num_processes, self.quant_config)
        if self.config.moe_layers:
            super().recursive_replace()
        else:
            Base.recursive_replace(self)

    def _decorate_for_torch_compile(self) -> None:
        """Compile the decoder, whose arguments differ from those that the backend expects."""
        self._decorate_cls_for_torch_compile(
            cls=self._pre_trained_model_classes.decoder,
            dynamic_arg_dims=DynamicArgDims(inputs_embeds=1, is_image=1, position_ids=-1),
            enable_if=can_enable_torch_compile,
            is_encoder=False,
        )
