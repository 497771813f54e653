"""The whole model: vision encoder, connector, Megatron's GPTModel with MoIIE layers.

    tokens (b, s)                     images (i, 3, H, W)          first pipeline stage
        | embedding                       | vision encoder, connector
    (s, b, h)                         (i, p, h)
        +------------- merge -------------+
                          | split over tensor-parallel ranks
    token types (b, s) -> Megatron's decoder, as padding_mask      every stage
                          | select tokens with a label
    labels (b, s) ------> output layer, cross-entropy              last stage

Shape letters: see ``moe/__init__.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moiie_megatron.layout.token_types import TEXT
from moiie_megatron.vlm.connector import Connector
from moiie_megatron.vlm.language_model import LanguageModel
from moiie_megatron.vlm.last_image_token import last_image_tokens_as_text
from moiie_megatron.vlm.merge import merge_images
from moiie_megatron.vlm.vision import VisionEncoder


class MoIIEModel(MegatronModule):
    """One pipeline stage of the vision-language model.

    Vision encoder and connector live on the first stage, replicated over tensor-parallel ranks.

    Args:
        config: Megatron's configuration of the language model.
        language_model: This stage's part of the decoder.
        vision_encoder: On the first stage; None elsewhere.
        connector: On the first stage; None elsewhere.
        groups: Megatron's process groups.
        last_image_token_as_text: Route as the reference's code does (``last_image_token.py``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        language_model: LanguageModel,
        vision_encoder: VisionEncoder | None,
        connector: Connector | None,
        groups: ProcessGroupCollection,
        *,
        last_image_token_as_text: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.language_model = language_model
        self.vision_encoder = vision_encoder
        self.connector = connector
        self.groups = groups
        self.last_image_token_as_text = last_image_token_as_text
        # Megatron's schedules and gradient reductions read these from the outermost module.
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.share_embeddings_and_output_weights = (
            language_model.share_embeddings_and_output_weights
        )
        self.model_type = language_model.model_type
        self.vp_stage = language_model.vp_stage

    @property
    def num_tokens(self) -> int:
        """Rows of the embedding table that are tokens."""
        return self.language_model.num_tokens

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the activations of the previous pipeline stage."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight, for Megatron's reduction over first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        token_types: Tensor,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            tokens: int64 ``(b, s)``; ids at image positions are ignored.
            position_ids: int64 ``(b, s)``.
            token_types: int8 ``(b, s)``, needed on every stage.
            images: Normalised ``(i, 3, H, W)``, in the order of their tokens in the batch; first
                stage only.
            labels: int64 ``(b, s)``, already shifted, -100 where there is none; last stage only.
            label_positions: int64 ``(y,)``, positions of the labels in the flattened ``(s, b)``;
                default: computed from the labels, which is a host sync.
            inputs_embeds: ``(b, s, h)`` instead of tokens and images (parity tests).
            packed_seq_params: The segments of a packed row (b = 1), needed on every stage;
                attention and positions start anew in each.

        Returns:
            Hidden states on earlier stages; on the last one the loss per token ``(b, s)`` (0
            where there is no label), or without labels the logits ``(b, s, vocabulary)``.

        Raises:
            ValueError: The number of image positions does not match the images, or (in a MoE
                layer) the token types do not match the tokens.
        """
        decoder_input = None
        if self.pre_process:
            decoder_input = self._embed(tokens, position_ids, token_types, images, inputs_embeds)
        routed_types = token_types
        if self.last_image_token_as_text:
            routed_types = last_image_tokens_as_text(token_types)
        if labels is not None:
            labels_sb = labels.t().reshape(-1)
            if label_positions is None:
                label_positions = (labels_sb >= 0).nonzero().squeeze(1)
            labels = labels_sb.index_select(0, label_positions).unsqueeze(0)
        output: Tensor = self.language_model(
            input_ids=tokens,
            position_ids=position_ids,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=labels,
            # Not a mask: LanguageModel takes the positions of the labels in this argument, the
            # one that Megatron passes on to _postprocess without touching it.
            loss_mask=label_positions,
            # Not padding: Megatron's one per-token argument carries the token types to the MoE
            # layers (see MoIIELayer).  GPTModel does not split it for sequence parallelism when
            # it gets decoder_input.
            padding_mask=self._split_like_hidden_states(routed_types),
            runtime_gather_output=labels is None,
            packed_seq_params=packed_seq_params,
        )
        if labels is None or not self.post_process:
            return output
        assert label_positions is not None
        losses_sb = output.new_zeros(tokens.numel()).index_copy(
            0, label_positions, output.flatten()
        )
        return losses_sb.view(tokens.t().shape).t()

    def _split_like_hidden_states(self, token_types: Tensor) -> Tensor:
        if not self.config.sequence_parallel:
            return token_types
        return token_types.chunk(self.groups.tp.size(), dim=1)[self.groups.tp.rank()].contiguous()

    def _embed(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        token_types: Tensor,
        images: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """Embed text, encode images, merge: ``(s, b, h)``, split for sequence parallelism."""
        if inputs_embeds is not None:
            merged = inputs_embeds.transpose(0, 1).contiguous()
        else:
            # The image id may lie outside the vocabulary, so it is never looked up.
            text = torch.where(token_types == TEXT, tokens, 0)
            merged = self.language_model.embedding(input_ids=text, position_ids=position_ids)
            merged = self._add_images(merged, token_types, images)
        if torch.is_grad_enabled() and not merged.requires_grad:
            # Nothing before the decoder trains.  Megatron's recompute checkpoints give their
            # output a gradient only if an input has one: without it the experts would not train.
            merged = merged.detach().requires_grad_()
        if self.config.sequence_parallel:
            merged = scatter_to_sequence_parallel_region(merged, group=self.groups.tp)
        return merged

    def _add_images(self, embeddings: Tensor, token_types: Tensor, images: Tensor | None) -> Tensor:
        assert self.vision_encoder is not None and self.connector is not None
        if images is None or not len(images):
            merge_images(embeddings, embeddings.new_zeros(0, 1, embeddings.shape[2]), token_types)
            return embeddings + self._zero_of_vision_weights(embeddings)
        return merge_images(embeddings, self.connector(self.vision_encoder(images)), token_types)

    def _zero_of_vision_weights(self, like: Tensor) -> Tensor:
        """A zero that depends on every trained vision weight, so that each gets a gradient.

        Gradient reductions that overlap with the backward pass wait for every parameter, also in
        a micro-batch without images.
        """
        modules = [m for m in (self.vision_encoder, self.connector) if m is not None]
        trained = [
            p.flatten()[0] for module in modules for p in module.parameters() if p.requires_grad
        ]
        return (torch.stack(trained).sum() * 0.0).to(like.dtype) if trained else like.new_zeros(())
