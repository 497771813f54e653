"""Tiny random models of transformers, in every family that ours starts from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel


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
    torch.manual_seed(5)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[family](**(values | changes))
    )
    randomise_vectors(model)
    return model.eval()


@torch.no_grad()
def randomise_vectors(model: torch.nn.Module) -> None:
    """Fresh norms and biases are all alike, which would hide that two were swapped."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.uniform_(-0.5, 0.5)
