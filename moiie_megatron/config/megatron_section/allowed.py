"""Fields of Megatron-Core's TransformerConfig that the ``megatron`` section may set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from moiie_megatron.config.section import FractionBelowOne, NonNegativeFloat, PositiveInt

Losses = Literal["the same", "the same up to rounding", "different"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]


@dataclass(frozen=True)
class Allowed:
    """A field that may be set.

    Attributes:
        kind: Type of its values, for pydantic; null leaves the field alone.
        effect: What it does.
        losses: Losses and gradients, compared with those without it.
        needs: When it may be set; empty for always.  ``check.py`` has the conditions.
    """

    kind: Any
    effect: str
    losses: Losses
    needs: str = ""


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
        "Megatron's fused cross-entropy (default false), which rounds the gradients of the logits "
        "to bf16",
        "different",
    ),
    "apply_rope_fusion": Allowed(
        bool,
        "rotary embeddings in one kernel; default: with `data.packing` and Transformer Engine",
        "the same up to rounding",
        f"{_TE} to switch it on",
    ),
    "attention_backend": Allowed(
        Literal["auto", "flash", "fused", "unfused"],
        "which of Transformer Engine's attention kernels may be used: FlashAttention, cuDNN's, "
        "or unfused ones (default auto: any)",
        "the same up to rounding",
        _TE,
    ),
}
