"""The whole model: vision encoder, connector, Megatron's GPTModel with MoIIE layers.

    tokens (b, s)                     images (i / TP, 3, H, W)     first pipeline stage
        | embedding                       | vision encoder, connector
        |                                 | gather over tensor-parallel ranks
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

from moiie_megatron.data.stream.batch import image_positions as positions_of
from moiie_megatron.layout.token_types import TEXT
from moiie_megatron.mcore.inference.cache import KeyValueCache
from moiie_megatron.vlm.connector import Connector
from moiie_megatron.vlm.image_split import gather_features, images_of_rank
from moiie_megatron.vlm.language_model import LanguageModel
from moiie_megatron.vlm.last_image_token import last_image_tokens_as_text
from moiie_megatron.vlm.merge import merge_images
from moiie_megatron.vlm.vision import VisionEncoder


class MoIIEModel(MegatronModule):
    """One pipeline stage of the vision-language model.

    Vision encoder and connector live on the first stage.  Every tensor-parallel rank has their
    whole weights and encodes its part of the images (``image_split.py``).

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
        # In the order of the forward pass: gathers of weights overlap with it bucket by bucket.
        self.vision_encoder = vision_encoder
        self.connector = connector
        self.language_model = language_model
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

    def forward(  # noqa: PLR0913  # what the stages need of a micro-batch
        self,
        tokens: Tensor,
        position_ids: Tensor,
        token_types: Tensor,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        image_positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: KeyValueCache | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            tokens: int64 ``(b, s)``; ids at image positions are ignored.
            position_ids: int64 ``(b, s)``.
            token_types: int8 ``(b, s)``, needed on every stage.
            images: Normalised ``(images of this rank, 3, H, W)``: this tensor-parallel rank's
                part (``image_split.images_of_rank``) of the images, which are in the order of
                their tokens in the batch; first stage only.  None is no image; without gradients
                the vision encoder does not run then.
            labels: int64 ``(b, s)``, already shifted, -100 where there is none; last stage only.
            label_positions: int64 ``(y,)``, positions of the labels in the flattened ``(s, b)``;
                default: computed from the labels, which is a host sync.  Without labels: where
                logits are wanted.
            image_positions: int64 ``(i * p,)``, where the features of the images go
                (``data/stream/batch.py``); first stage only.  Default: computed from the token
                types, which is a host sync.
            inputs_embeds: ``(b, s, h)`` instead of tokens and images (parity tests).
            packed_seq_params: The segments of a packed row (b = 1), needed on every stage;
                attention and positions start anew in each.
            inference_context: The key-value cache, whose pass the tokens are (b = 1).

        Returns:
            Hidden states on earlier stages; on the last one the loss per token ``(b, s)`` (0
            where there is no label), or without labels the logits ``(b, s, vocabulary)``, with
            ``label_positions`` ``(1, y, vocabulary)``.

        Raises:
            ValueError: The number of image positions does not match the images, or (in a MoE
                layer) the token types do not match the tokens.
        """
        decoder_input = None
        if self.pre_process:
            if inputs_embeds is not None:
                merged = inputs_embeds.transpose(0, 1).contiguous()
            else:
                merged = self._embed(tokens, position_ids, token_types, images, image_positions)
            decoder_input = self._split_embeddings(merged)
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
            inference_context=inference_context,
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
        image_positions: Tensor | None,
    ) -> Tensor:
        """Embed text, encode images, merge: ``(s, b, h)``."""
        if image_positions is None:
            image_positions = positions_of(token_types)
        if images is None and not torch.is_grad_enabled():
            return self._embed_text(tokens, position_ids, token_types)
        if images is None:
            images = token_types.new_empty(0, dtype=self.config.params_dtype)
        # Before the embedding, as in the order of the weights.
        features = self._image_features(images, len(image_positions))
        embeddings = self._embed_text(tokens, position_ids, token_types)
        return merge_images(embeddings, features, image_positions)

    def _embed_text(self, tokens: Tensor, position_ids: Tensor, token_types: Tensor) -> Tensor:
        # The image id may lie outside the vocabulary, so it is never looked up.
        text = torch.where(token_types == TEXT, tokens, 0)
        embeddings: Tensor = self.language_model.embedding(
            input_ids=text, position_ids=position_ids
        )
        return embeddings

    def _image_features(self, images: Tensor, positions: int) -> Tensor:
        """The features ``(i, p, h)`` of all images, of which ``images`` is this rank's part."""
        assert self.vision_encoder is not None and self.connector is not None
        p = self.vision_encoder.config.num_image_tokens
        i, rest = divmod(positions, p)
        part = images_of_rank(i, self.groups.tp)
        if rest or len(images) != part.stop - part.start:
            raise ValueError(
                f"The tokens hold {positions} image positions, of which this rank has images "
                f"[{part.start}, {part.stop}) of {p} image tokens each, but it is given "
                f"{len(images)} images: every placeholder must be expanded to {p} image ids."
            )
        return gather_features(self.connector(self.vision_encoder(images)), i, self.groups.tp)

    def _split_embeddings(self, merged_sbh: Tensor) -> Tensor:
        """This rank's part of the sequence under sequence parallelism, with a gradient."""
        if torch.is_grad_enabled() and not merged_sbh.requires_grad:
            # Nothing before the decoder trains.  Megatron's recompute checkpoints give their
            # output a gradient only if an input has one: without it the experts would not train.
            merged_sbh = merged_sbh.detach().requires_grad_()
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(merged_sbh, group=self.groups.tp)
        return merged_sbh
