"""Llama 2 and 3 and what has their architecture (SmolLM2, TinyLlama, Vicuna...).

Names: transformers, ``modeling_llama.py``.  Other families take lines of these tables where theirs
are the same.
"""

from __future__ import annotations

from typing import Final

from moiie_megatron.families.family import ChatFormat, LanguageFamily, Weight, gate_up, qkv

CONFIG: Final = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "rotary_base": "rope_theta",
    "rope_scaling": "rope_scaling",
    "longrope": "rope_scaling",
}

EMBEDDINGS: Final = (
    Weight(
        "language_model.embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        ("vocab", "hidden"),
        shard_axis=0,
    ),
    Weight("language_model.decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
    Weight(
        "language_model.output_layer.weight",
        ("lm_head.weight",),
        ("vocab", "hidden"),
        shard_axis=0,
    ),
)

ATTENTION: Final = (
    Weight(
        "language_model.decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.*.input_layernorm.weight",),
        ("hidden",),
    ),
    Weight(
        "language_model.decoder.layers.*.self_attention.linear_qkv.weight",
        (
            "model.layers.*.self_attn.q_proj.weight",
            "model.layers.*.self_attn.k_proj.weight",
            "model.layers.*.self_attn.v_proj.weight",
        ),
        ("qkv", "hidden"),
        shard_axis=0,
        transform=qkv,
    ),
    Weight(
        "language_model.decoder.layers.*.self_attention.linear_proj.weight",
        ("model.layers.*.self_attn.o_proj.weight",),
        ("hidden", "attention"),
        shard_axis=1,
    ),
)

FFN: Final = (
    Weight(
        "language_model.decoder.layers.*.mlp.linear_fc1.weight",
        ("model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"),
        ("gate_up", "hidden"),
        shard_axis=0,
        shard_blocks=2,
        transform=gate_up,
    ),
    Weight(
        "language_model.decoder.layers.*.mlp.linear_fc2.weight",
        ("model.layers.*.mlp.down_proj.weight",),
        ("hidden", "ffn"),
        shard_axis=1,
    ),
    Weight(
        "language_model.decoder.layers.*.mlp.linear_fc1.layer_norm_weight",
        ("model.layers.*.post_attention_layernorm.weight",),
        ("hidden",),
    ),
)

# The names of the MoIIE reference, whatever the family: ``gate`` is the text router (where all
# experts are shared the only one), ``gate_vis`` the vision router.
ROUTERS: Final = (
    Weight(
        "language_model.decoder.layers.*.mlp.router.gates.vision",
        ("model.layers.*.mlp.gate_vis.weight",),
        ("router", "hidden"),
    ),
    Weight(
        "language_model.decoder.layers.*.mlp.router.gates.text",
        ("model.layers.*.mlp.gate.weight",),
        ("router", "hidden"),
    ),
    Weight(
        "language_model.decoder.layers.*.mlp.router.gates.joint",
        ("model.layers.*.mlp.gate.weight",),
        ("router", "hidden"),
    ),
)

EXPERTS: Final = (
    Weight(
        "language_model.decoder.layers.*.mlp.experts.experts.linear_fc1.weight",
        (
            "model.layers.*.mlp.experts.*.gate_proj.weight",
            "model.layers.*.mlp.experts.*.up_proj.weight",
        ),
        ("gate_up", "hidden"),
        shard_axis=0,
        shard_blocks=2,
        transform=gate_up,
    ),
    Weight(
        "language_model.decoder.layers.*.mlp.experts.experts.linear_fc2.weight",
        ("model.layers.*.mlp.experts.*.down_proj.weight",),
        ("hidden", "ffn"),
        shard_axis=1,
    ),
)

# The norm in front of experts stands alone; that of a dense layer has the name of the linear
# layer that Transformer Engine fuses it with.
MOE_NORM: Final = Weight(
    "language_model.decoder.layers.*.pre_mlp_layernorm.weight",
    ("model.layers.*.post_attention_layernorm.weight",),
    ("hidden",),
)

MOE: Final = (*ROUTERS, *EXPERTS, MOE_NORM)

# Llama-3 Instruct (Meta's model card, "Prompt format"); turns are stripped as there.
CHAT: Final = ChatFormat(
    "llama3",
    begin="<|begin_of_text|>",
    header="<|start_header_id|>{role}<|end_header_id|>\n\n",
    end="<|eot_id|>",
    markers=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    strips=True,
)

FAMILY: Final = LanguageFamily(
    "llama",
    config=CONFIG,
    weights=(*EMBEDDINGS, *ATTENTION),
    ffn=FFN,
    moe=MOE,
    chat_formats=(CHAT,),
)
