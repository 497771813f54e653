"""Fields of Megatron-Core's TransformerConfig that the ``megatron`` section may set."""

from __future__ import annotations

from typing import Final, Literal

from moiie_megatron.config.megatron_section.table import Allowed
from moiie_megatron.config.section import FractionBelowOne, NonNegativeFloat, PositiveInt

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]

_TE: Final = "Transformer Engine"

ALLOWED: Final[dict[str, Allowed]] = {
    "recompute_granularity": Allowed(
        Literal["full", "selective"],
        "recompute activations in the backward pass instead of keeping them: whole layers (full) "
        "or `recompute_modules` (selective)",
        "the same",
    ),
    "recompute_method": Allowed(
        Literal["uniform", "block"],
        "uniform: keep the input of every `recompute_num_layers` layers; block: recompute the "
        "first `recompute_num_layers` layers of each pipeline stage and keep the others' "
        "activations",
        "the same",
        "`recompute_granularity: full`",
    ),
    "recompute_num_layers": Allowed(
        PositiveInt,
        "see `recompute_method`; with uniform a divisor of the layers of each pipeline stage",
        "the same",
        "`recompute_granularity: full`",
    ),
    "recompute_modules": Allowed(
        list[RecomputeModule],
        "what to recompute: attention (core_attn), dense FFNs (mlp), layers of experts (moe), the "
        "norms before them (layernorm), their activations (moe_act)",
        "the same",
        "`recompute_granularity: selective`; moe, moe_act and layernorm need experts, mlp a dense "
        f"layer, moe_act and layernorm {_TE}",
    ),
    "init_method_std": Allowed(
        NonNegativeFloat,
        "standard deviation of fresh weights of the decoder (default 0.02); weights that are "
        "loaded do not depend on it",
        "different",
    ),
    "embedding_init_method_std": Allowed(
        NonNegativeFloat,
        "the same for token embeddings; default: `init_method_std`",
        "different",
    ),
    "hidden_dropout": Allowed(
        FractionBelowOne,
        "dropout on the outputs of attention and of FFNs or experts, in training only",
        "different",
    ),
    "attention_dropout": Allowed(
        FractionBelowOne, "dropout on attention weights, in training only", "different"
    ),
    "bias_activation_fusion": Allowed(
        bool,
        "activation and product of a gated FFN in one kernel; default: on GPUs",
        "the same up to rounding",
    ),
    "bias_dropout_fusion": Allowed(
        bool, "dropout and residual sum in one kernel (default false)", "the same up to rounding"
    ),
    "cross_entropy_loss_fusion": Allowed(
        bool,
        "cross-entropy in one kernel, see `cross_entropy_fusion_impl`; default: with Transformer "
        "Engine",
        "the same up to rounding",
    ),
    "cross_entropy_fusion_impl": Allowed(
        Literal["te", "native"],
        "te: Transformer Engine's kernel, which makes no fp32 copy of the logits (default where it "
        "is); native: Megatron's own, which rounds the gradients of the logits to bf16 (default "
        "elsewhere)",
        "different",
        f"`cross_entropy_loss_fusion`; te {_TE}",
    ),
    "apply_rope_fusion": Allowed(
        bool,
        "rotary embeddings in one kernel; default: with Transformer Engine",
        "the same up to rounding",
        f"{_TE} to switch it on",
    ),
    "moe_permute_fusion": Allowed(
        bool,
        "sort rows by expert in one kernel; default: with Transformer Engine",
        "the same up to rounding",
        f"{_TE} to switch it on; another `moe.dispatcher` than moiie",
    ),
    "attention_backend": Allowed(
        Literal["auto", "flash", "fused", "unfused"],
        "which of Transformer Engine's attention kernels may be used: FlashAttention, cuDNN's, "
        "or unfused ones (default auto: any)",
        "the same up to rounding",
        _TE,
    ),
}
