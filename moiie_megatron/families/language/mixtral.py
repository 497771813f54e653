"""Mixtral: Mistral with pretrained experts in every layer, which become Vanilla MoE.

Names: transformers, ``modeling_mixtral.py``, on disk (``conversion_mapping.py``).
"""

from __future__ import annotations

import re
from typing import Final

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.families.family import LanguageFamily, Part, Weight, gate_up
from moiie_megatron.families.language import llama
from moiie_megatron.utils.errors import UserError

EXPERTS: Final = (
    Weight(
        "language_model.decoder.layers.*.mlp.router.gates.joint",
        ("model.layers.*.block_sparse_moe.gate.weight",),
        ("router", "hidden"),
    ),
    Weight(
        "language_model.decoder.layers.*.mlp.experts.experts.linear_fc1.weight",
        (
            "model.layers.*.block_sparse_moe.experts.*.w1.weight",
            "model.layers.*.block_sparse_moe.experts.*.w3.weight",
        ),
        ("gate_up", "hidden"),
        shard_axis=0,
        shard_blocks=2,
        transform=gate_up,
    ),
    Weight(
        "language_model.decoder.layers.*.mlp.experts.experts.linear_fc2.weight",
        ("model.layers.*.block_sparse_moe.experts.*.w2.weight",),
        ("hidden", "ffn"),
        shard_axis=1,
    ),
)

EXPERT_CONFIG: Final = {"num_shared_experts": "num_local_experts", "top_k": "num_experts_per_tok"}

_FUSED: Final = re.compile(r"(.*)\.mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)")


def split_fused_experts(name: str, shape: tuple[int, ...]) -> dict[str, Part] | None:
    """Experts as transformers 5 holds them, one tensor per layer, under their names on disk.

    Args:
        name: ``mlp.experts.gate_up_proj``, ``mlp.experts.down_proj`` or ``mlp.gate.weight`` of a
            layer.
        shape: ``(experts, 2 f, h)`` with rows ``[gate | up]``, ``(experts, h, f)``, or that of the
            router.
    """
    match = _FUSED.fullmatch(name)
    if match is None:
        return None
    start = f"{match[1]}.block_sparse_moe."
    if match[2] == "gate.weight":
        return {start + "gate.weight": ()}
    parts = dict[str, Part]()
    for expert in range(shape[0]):
        if match[2] == "experts.down_proj":
            parts[f"{start}experts.{expert}.w2.weight"] = (expert, slice(None))
        else:
            ffn = shape[1] // 2
            parts[f"{start}experts.{expert}.w1.weight"] = (expert, slice(0, ffn))
            parts[f"{start}experts.{expert}.w3.weight"] = (expert, slice(ffn, shape[1]))
    return parts


def check(config: RunConfig) -> None:
    """The experts are pretrained: every stage has them, in every layer, for all tokens."""
    moe, num_layers = config.moe, config.language.num_layers
    if config.stage.moe and moe.variant == "vanilla" and len(config.moe_layers) == num_layers:
        return
    raise UserError(
        f"language.family is mixtral, which has experts for all tokens in all of its {num_layers} "
        f"layers, but stage.moe is {str(config.stage.moe).lower()}, moe.variant is {moe.variant} "
        f"and moe.layers is {moe.layers}: set them to true, vanilla and all."
    )


FAMILY: Final = LanguageFamily(
    "mixtral",
    config=llama.CONFIG | {"sliding_window": "sliding_window"},
    weights=(*llama.EMBEDDINGS, *llama.ATTENTION),
    ffn=llama.FFN,
    moe=(*EXPERTS, llama.MOE_NORM),
    expert_config=EXPERT_CONFIG,
    split_stored=split_fused_experts,
    exported_as="mistral",  # whose attention it has; experts have names of their own there
    check=check,
)
