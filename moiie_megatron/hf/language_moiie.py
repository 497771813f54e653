"""The decoder of MoIIE, with experts in some layers, for transformers.

Image tokens choose among vision and shared experts, text tokens among text and shared experts
(paper, section 3).  Attention, norms, rotary embedding and dense FFN are transformers' own
classes of the text model's family.

Shapes: B batch, S sequence, T = B * S tokens, H hidden, E experts, K experts per token.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from .version_moiie import TESTED_VERSIONS  # noqa: F401  # first: older versions lack names below

# isort: split

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_moiie import CACHE, check_takes_cache
from .configuration_moiie import MoiieConfig

# Experts are stored one by one and computed together.
register_checkpoint_conversion_mapping(
    "moiie",
    [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            [MergeModulelist(0), Concatenate(1)],
        ),
        WeightConverter(
            ["mlp.experts.*.down_proj.weight"], "mlp.experts.down_proj", [MergeModulelist(0)]
        ),
    ],
    overwrite=True,  # this file is imported again for every exported directory
)


# What a decoder layer of the text model's family must consist of.
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class DecoderParts(NamedTuple):
    """transformers' modules for the decoder of a family."""

    attention: type[nn.Module]
    mlp: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> DecoderParts:
        """The modules that belong to a text model's configuration.

        They stand in the file beside the configuration's, under names that begin like its own:
        ``XConfig`` of ``configuration_x.py`` has ``XAttention`` in ``modeling_x.py``.

        Raises:
            ValueError: A decoder of another architecture than a norm, attention, a norm and a
                gated FFN in every layer.
            RuntimeError: An attention that would ignore the cache.
        """
        kind = type(config)
        module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
        family = kind.__name__.removesuffix("Config")
        names = ("Attention", "MLP", "RMSNorm", "RotaryEmbedding", "DecoderLayer")
        found: list[Any] = [getattr(module, family + name, None) for name in names]
        if None not in found:
            *parts, layer = found
            with torch.device("meta"):
                inside = {name.split(".")[0] for name, _ in layer(config, 0).named_parameters()}
            if inside == _LAYER_PARTS:
                check_takes_cache(parts[0].forward)
                return cls(*parts)
        raise ValueError(
            f"text_config.model_type is {config.model_type}, whose layers are not a norm, "
            "attention, a norm and a gated FFN: use a text model with such layers."
        )


class MoiieGate(nn.Module):
    """The weights of one router: a score for each expert that it may choose."""

    def __init__(self, hidden_size: int, ids: range, num_experts: int, is_fp32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(ids), hidden_size))
        self.edges = (ids.start, num_experts - ids.stop)
        self.is_fp32 = is_fp32

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Scores over all experts ``(T, E)``, -inf at the forbidden ones."""
        dtype = torch.float32 if self.is_fp32 else hidden_TH.dtype
        scores = F.linear(hidden_TH.to(dtype), self.weight.to(dtype))
        return F.pad(scores, self.edges, value=float("-inf"))


class MoiieTopK(nn.Module):
    """From scores to experts and their weights."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, scores_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax over all allowed experts, then the best K, whose weights add up to one.

        Returns:
            The scores as they came in (what ``output_router_logits`` records), weights fp32
            ``(T, K)`` and expert ids ``(T, K)``.
        """
        top_TK, ids_TK = torch.topk(torch.softmax(scores_TE.float(), dim=-1), self.top_k, dim=-1)
        return scores_TE, top_TK / top_TK.sum(dim=-1, keepdim=True), ids_TK


@use_experts_implementation
class MoiieExperts(nn.Module):
    """All experts of a layer; transformers chooses the implementation (default: grouped_mm)."""

    def __init__(self, config: PreTrainedConfig, num_experts: int) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The ``eager`` implementation: one expert after another, ``(T, H)`` to ``(T, H)``."""
        output = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            gate_up = F.linear(hidden_states[token], self.gate_up_proj[expert])
            gate, up = gate_up.chunk(2, dim=-1)
            result = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output = output.index_add(0, token, result * top_k_weights[token, slot, None])
        return output.to(hidden_states.dtype)


class MoiieSparseMLP(nn.Module):
    """The block that replaces the FFN in a layer with experts."""

    gate: MoiieGate
    gate_vis: MoiieGate  # only with two routers

    def __init__(self, config: PreTrainedConfig, moiie: MoiieConfig) -> None:
        super().__init__()
        for name, ids in moiie.routers.items():
            is_fp32 = moiie.router_dtype == "float32"
            gate = MoiieGate(config.hidden_size, ids, moiie.num_experts, is_fp32)
            self.add_module(name, gate)
        self.has_two_routers = len(moiie.routers) == 2
        self.top_k = MoiieTopK(moiie.num_experts_per_tok)
        self.experts = MoiieExperts(config, moiie.num_experts)

    def forward(self, hidden_states: Tensor, is_image: Tensor) -> Tensor:
        """``(B, S, H)`` to ``(B, S, H)``; ``is_image``: bool ``(B, S)``.

        Raises:
            ValueError: Another number of token types than of tokens: they would be broadcast.
        """
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        if is_image.numel() != hidden_TH.shape[0]:
            raise ValueError(
                f"is_image has shape {tuple(is_image.shape)} for {hidden_TH.shape[0]} tokens: "
                "pass one value per token."
            )
        scores_TE = self.gate(hidden_TH)
        if self.has_two_routers:
            is_image_T1 = is_image.reshape(-1, 1)
            scores_TE = torch.where(is_image_T1, self.gate_vis(hidden_TH), scores_TE)
        _, weights_TK, ids_TK = self.top_k(scores_TE)
        return self.experts(hidden_TH, ids_TK, weights_TK).view_as(hidden_states)


class MoiieDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a dense FFN or experts."""

    def __init__(
        self, config: PreTrainedConfig, moiie: MoiieConfig, parts: DecoderParts, layer_idx: int
    ) -> None:
        super().__init__()
        self.self_attn = parts.attention(config, layer_idx)
        self.is_sparse = layer_idx in moiie.moe_layers
        self.mlp = MoiieSparseMLP(config, moiie) if self.is_sparse else parts.mlp(config)
        self.input_layernorm = parts.norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = parts.norm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(getattr(config, "resid_pdrop", 0.0))  # some families have one

    def forward(self, hidden_states: Tensor, is_image: Tensor, **kwargs: Any) -> Tensor:
        """``kwargs`` go to the attention."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        normed = self.post_attention_layernorm(hidden_states)
        output = self.mlp(normed, is_image) if self.is_sparse else self.mlp(normed)
        return hidden_states + self.dropout(output)


class MoiiePreTrainedModel(PreTrainedModel):
    """Loading, saving and initialising."""

    config_class = MoiieConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoiieDecoderLayer"]  # the vision tower adds its own
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.head\."]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Whether the decorator is in the file of the class, where transformers looks for it."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, MoiieGate):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, MoiieExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class MoiieLanguageModel(MoiiePreTrainedModel):
    """The decoder.  ``config`` is the text model's; ``moiie`` says where experts are."""

    config_class = PreTrainedConfig
    _can_record_outputs = {
        "hidden_states": MoiieDecoderLayer,
        "attentions": OutputRecorder(None, index=1, class_name="self_attn"),
        "router_logits": OutputRecorder(MoiieTopK, index=0),
    }

    def __init__(self, config: PreTrainedConfig, moiie: MoiieConfig) -> None:
        super().__init__(config)
        parts = DecoderParts.of(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [MoiieDecoderLayer(config, moiie, parts, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = parts.norm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = parts.rotary(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        is_image: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the decoder on ``inputs_embeds`` ``(B, S, H)``.

        ``is_image``, bool ``(B, S)``, marks the tokens of the vision router.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (positions + seen).unsqueeze(0)
        is_sliding = getattr(self.config, "sliding_window", None) is not None
        mask_function = create_sliding_window_causal_mask if is_sliding else create_causal_mask
        mask = mask_function(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                is_image=is_image,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{CACHE: past_key_values},
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values}
        )
