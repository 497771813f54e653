"""Tiny random models of transformers, in every family that ours starts from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
}


def language_model(family: str, **changes: Any) -> PreTrainedModel:
    """A language model of the sizes of ``tiny.language``.

    Args:
        changes: To transformers' configuration.
    """
    values: dict[str, Any] = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family == "phi3" else 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0 if family == "phi3" else 500000.0,
        },
        "pad_token_id": 0,
        "initializer_range": 0.2,  # far from linear: a wrong layout shows
    }
    config_class, model_class = _CLASSES[family]
    torch.manual_seed(5)
    model = model_class(config_class(**(values | changes))).eval()
    randomise_norms(model)
    return model


@torch.no_grad()
def randomise_norms(model: torch.nn.Module) -> None:
    """Fresh norms are all alike, which would hide that two were swapped."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
