"""MoIIE: a vision-language model whose experts are split by modality, for transformers.

Shapes: B batch, S sequence, T = B * S tokens, H hidden, E experts, n images, p image tokens per
image.
"""

from __future__ import annotations

from typing import Any

from .version_moiie import TESTED_VERSIONS  # noqa: F401  # first: older versions lack names below

# isort: split

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.utils import can_return_tuple
from transformers.utils.import_utils import torch_compilable_check

from .cache_moiie import CACHE, check_covers, one_cache, take_cache
from .configuration_moiie import MoiieConfig
from .language_moiie import MoiieLanguageModel, MoiiePreTrainedModel
from .token_types_moiie import IMAGE, types_of_step, types_to_generate


class MoiieConnector(nn.Module):
    """Image features into the embedding space of the text model: Linear, GELU, Linear."""

    def __init__(self, config: MoiieConfig) -> None:
        super().__init__()
        inner = config.connector_hidden_size
        assert inner is not None  # set by the configuration
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, inner)
        self.linear_2 = nn.Linear(inner, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class MoiieModel(MoiiePreTrainedModel):
    """Vision encoder, connector and decoder, without the head."""

    def __init__(self, config: MoiieConfig) -> None:
        super().__init__(config)
        # A choice made for the whole model: the tower has no experts and would refuse it.
        config.vision_config._experts_implementation = None
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = MoiieConnector(config)
        # By keyword: vLLM, which compiles this class, compares positional arguments with their
        # annotations, which are strings here.
        self.language_model = MoiieLanguageModel(config.text_config, moiie=config)
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: ``(n, 3, height, width)``, normalised.

        Returns:
            ``pooler_output``: n tensors ``(p, H)``, ready for the text model.
        """
        kwargs["output_hidden_states"] = True
        output = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **kwargs)
        features = output.hidden_states[self.config.vision_feature_layer]
        # Class tokens, where there are any, stand in front of the patches.
        features = features[:, -self.config.num_patches :]
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=list(self.multi_modal_projector(features)),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the model.

        Args:
            input_ids: ``(B, S)``; what stands at image positions does not matter.
            pixel_values: ``(n, 3, height, width)`` in the order of their runs in the batch.
            past_key_values: May also be passed as ``cache``, its name from transformers 5.24 on.
            inputs_embeds: ``(B, S, H)`` instead of ``input_ids``.
            mm_token_type_ids: ``(B, S)``, 1 at image positions and 0 elsewhere.  Those of the
                whole sequence so far may be passed with its last positions.  Left out, the
                image positions are those of ``image_token_id``, until there is a cache: a token
                that is decoded is text, whatever its id.
            mm_encoder_outputs: ``{"image": get_image_features(...)}`` instead of
                ``pixel_values``; ``generate`` encodes images once and passes them like this.

        Raises:
            ValueError: Both or none of two exclusive inputs, token types of another shape or
                needed but left out, or numbers of image positions and of image tokens that differ.
            RuntimeError: ``attention_mask`` has positions that neither this step nor the cache
                has, or a cache comes under an unknown name.
        """
        past_key_values = take_cache(past_key_values, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError("Pass images as pixel_values or as mm_encoder_outputs, not both.")
            encoded = self.get_image_features(pixel_values)
        given = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        if mm_token_type_ids is not None:
            is_image = types_of_step(mm_token_type_ids, given.shape, past_key_values) == IMAGE
        else:
            is_image = self._is_image(input_ids, past_key_values)
        if inputs_embeds is None:
            # What stands there need not be an id of the vocabulary.
            text_ids = input_ids.masked_fill(is_image, 0)
            inputs_embeds = self.language_model.embed_tokens(text_ids)
        if encoded is not None:
            inputs_embeds = _merge(inputs_embeds, encoded.pooler_output, is_image)
        elif input_ids is not None and not _is_decoded(
            input_ids, mm_token_type_ids, past_key_values
        ):
            _check_positions(is_image, 0)
        if attention_mask is not None and attention_mask.ndim == 2:
            check_covers(past_key_values, inputs_embeds.shape[1], attention_mask.shape[1])
        if self.config.last_image_token_as_text:
            is_image = is_image & F.pad(is_image[:, 1:], (0, 1), value=False)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            is_image=is_image,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _is_image(self, input_ids: Tensor | None, past_key_values: Cache | None) -> Tensor:
        if input_ids is None:
            raise ValueError(
                "inputs_embeds do not tell which positions are image tokens: pass "
                "mm_token_type_ids (1 image, 0 text) with them."
            )
        is_image = input_ids == self.config.image_token_id
        if not _is_filled(past_key_values):
            return is_image
        if input_ids.shape[1] > 1:
            torch_compilable_check(
                ~is_image.any(),
                "Behind a cache, input_ids do not tell an image from a decoded image token: pass "
                "mm_token_type_ids (1 image, 0 text) with them.",
            )
        return torch.zeros_like(is_image)


class MoiieForConditionalGeneration(MoiiePreTrainedModel, GenerationMixin):
    """The model that ``AutoModelForImageTextToText`` loads.

    Labels give the language loss alone: the routers' balance losses belong to pre-training.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MoiieConfig) -> None:
        super().__init__(config)
        self.model = MoiieModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See ``MoiieModel.get_image_features``."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """See ``MoiieModel.forward``.

        Args:
            labels: ``(B, S)``, -100 where there is none; shifted here.
            logits_to_keep: So many last positions, or the positions in a tensor of one axis; 0 for
                all.
            output_router_logits: Return each MoE layer's scores ``(T, E)``, -inf at forbidden
                experts.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        is_number = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if is_number else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if self.config.num_added_tokens:
            end = self.config.image_token_id + 1
            added = slice(end - self.config.num_added_tokens, end)
            logits[..., added] = torch.finfo(logits.dtype).min
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of a step; a longrope model that outgrows its original context starts again.

        Its rotary frequencies then change for all positions, so that the cache is useless.

        Token types are cut to the step here: transformers before 5.23 does not do it, and no
        version appends those of candidates in assisted decoding.

        Raises:
            ValueError: Two caches, or a prompt with images in chunks where ``generate`` does not
                pass their features (transformers before 5.23).
            RuntimeError: Positions that are not passed again are not in the cache either.
        """
        past_key_values = one_cache(past_key_values, cache)
        if self._outgrows_cache(input_ids, past_key_values, attention_mask):
            past_key_values, next_sequence_length, is_first_iteration = None, None, True
        elif next_sequence_length is not None:
            check_covers(past_key_values, next_sequence_length, input_ids.shape[1])
        if mm_token_type_ids is not None:
            starts = inputs_embeds is not None and is_first_iteration
            total = (inputs_embeds if starts else input_ids).shape[1]
            types = types_to_generate(
                mm_token_type_ids, total, next_sequence_length, past_key_values
            )
            is_old_chunk = total < mm_token_type_ids.shape[1] and next_sequence_length is None
            if is_old_chunk and not is_first_iteration and (types == IMAGE).any():
                raise ValueError(
                    f"prefill_chunk_size: transformers {transformers.__version__} does not pass "
                    "images with chunks of a prompt: leave it out, or use 5.23 or newer."
                )
            kwargs["mm_token_type_ids"] = types
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: past_key_values},
            **kwargs,
        )

    def _outgrows_cache(
        self, input_ids: Tensor, past_key_values: Cache | None, attention_mask: Tensor | None
    ) -> bool:
        rope = self.config.text_config.rope_parameters
        if rope.get("rope_type") != "longrope" or past_key_values is None:
            return False
        original, length = rope["original_max_position_embeddings"], input_ids.shape[1]
        if length <= original:  # before anything waits for the device
            return False
        cached = int(past_key_values.get_seq_length())
        if not 0 < cached < length:  # nothing yet, or a chunk of a prompt
            return False
        padding = 0
        if attention_mask is not None and attention_mask.ndim == 2:
            padding = attention_mask.shape[1] - int(attention_mask.sum(dim=1).max())
        return cached - padding <= original < length - padding


def _is_filled(cache: Any) -> bool:
    return isinstance(cache, Cache) and bool(cache.get_seq_length() > 0)


def _is_decoded(input_ids: Tensor, types: Tensor | None, cache: Any) -> bool:
    """Whether this is a step of decoding, where asking for images would wait for the device."""
    return input_ids.shape[1] == 1 and (types is not None or _is_filled(cache))


def _merge(embeds_BSH: Tensor, features: list[Tensor], is_image_BS: Tensor) -> Tensor:
    """Put image features at the image positions, in row-major order of the batch."""
    flat = torch.cat(list(features))
    _check_positions(is_image_BS, len(flat))
    flat = flat.to(device=embeds_BSH.device, dtype=embeds_BSH.dtype)
    return embeds_BSH.masked_scatter(is_image_BS.unsqueeze(-1), flat)


def _check_positions(is_image_BS: Tensor, num_image_tokens: int) -> None:
    torch_compilable_check(
        is_image_BS.sum() == num_image_tokens,
        lambda: (
            f"The tokens hold {int(is_image_BS.sum())} image positions, but the images given have "
            f"{num_image_tokens} image tokens: every placeholder must be expanded to one id per "
            "image token."
        ),
    )
