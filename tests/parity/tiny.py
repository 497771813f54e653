"""Configurations and inputs of the tiny models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moiie_megatron.config.schema import (
    DataConfig,
    LanguageConfig,
    MoEConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    VisionConfig,
)
from moiie_megatron.layout.token_types import IMAGE, PADDING, TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.vlm.build import build_model
from moiie_megatron.vlm.model import MoIIEModel

IGNORED = -100


def language(family: str, **changes: Any) -> LanguageConfig:
    """The decoder of the golden tiny models."""
    values: dict[str, Any] = {
        "family": family,
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2 if family == "llama" else 4,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "rotary_base": 500000.0 if family == "llama" else 10000.0,
        "norm_epsilon": 1e-5,
    }
    return LanguageConfig(**(values | changes))


def vision(family: str = "siglip", **changes: Any) -> VisionConfig:
    values: dict[str, Any] = {
        "family": family,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        "activation": "gelu_pytorch_tanh" if family == "siglip" else "quick_gelu",
        "norm_epsilon": 1e-6 if family == "siglip" else 1e-5,
    }
    return VisionConfig(**(values | changes))


def run_config(
    language: LanguageConfig,
    moe: MoEConfig | None = None,
    vision_config: VisionConfig | None = None,
    **sections: Any,
) -> RunConfig:
    """A run in fp32; without a ``moe`` section a dense one."""
    return RunConfig(
        output="unused",
        language=language,
        vision=vision_config or vision(),
        moe=moe or MoEConfig(variant="dense"),
        stage=StageConfig(
            name="test",
            moe=moe is not None,
            learning_rates={"language": 1e-3},
            template="plain",
            image_mode="square",
        ),
        data=DataConfig(sources=[], tokenizer="unused", sequence_length=32),
        train=TrainConfig(global_batch_size=2, steps=1, precision="fp32"),
        **sections,
    )


def build(config: RunConfig, context: ParallelContext) -> MoIIEModel:
    return build_model(config, context).train()


def token_types(inputs: dict[str, Tensor], case: str) -> Tensor:
    """The golden data marks padding in the attention mask, we in the token types."""
    types = torch.where(inputs[f"{case}.token_type_ids"] == 1, IMAGE, TEXT)
    types = torch.where(inputs[f"{case}.attention_mask"] == 1, types, PADDING)
    return types.to(torch.int8)


def shifted(labels: Tensor) -> Tensor:
    """Labels as our model takes them: the target of each position."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def forward(
    model: MoIIEModel, inputs: dict[str, Tensor], case: str, *, labels: bool = False
) -> Tensor:
    """Logits, or the mean loss.  Text goes through the model's own embedding; image features and
    the zeros at padding come from the data."""
    tokens, types = inputs[f"{case}.input_ids"], token_types(inputs, case)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    text = model.language_model.embedding(input_ids=tokens, position_ids=positions).transpose(0, 1)
    embeds = torch.where((types == TEXT).unsqueeze(-1), text, inputs[f"{case}.inputs_embeds"])
    targets = shifted(inputs[f"{case}.labels"])
    output = model(
        tokens, positions, types, labels=targets if labels else None, inputs_embeds=embeds
    )
    return output.sum() / (targets != IGNORED).sum() if labels else output


def random_batch(seed: int, vocabulary: int = 256) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions, mixed token types and embeddings of two rows of 24."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocabulary, (2, 24), generator=generator)
    types = torch.zeros(2, 24, dtype=torch.int8)
    types[0, 3:15] = IMAGE
    types[1, 18:] = PADDING
    embeds = torch.randn(2, 24, 64, generator=generator)
    return tokens, torch.arange(24).expand(2, 24), types, embeds
