"""Tiny Hugging Face directories: language models with a tokenizer, vision encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from moiie_megatron.families.registry import vision_family
from tests.parity.hf_models import randomise_vectors


def write_language(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    *,
    random_vectors: bool = False,
    **changes: Any,
) -> Path:
    """Four layers with random weights, and a tokenizer of four words.

    Args:
        random_vectors: Norms and biases are random, too.
        changes: To transformers' configuration.
    """
    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(values | changes)))
    if random_vectors:
        randomise_vectors(model)
    model.to(dtype).save_pretrained(folder)
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of four words."""
    words = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", "a"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


def write_vision(folder: Path, family: str = "siglip", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Two layers with random weights: 4 image tokens."""
    config = CONFIG_MAPPING[vision_family(family).model_type](
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(4)
    model: Any = AutoModel.from_config(config)
    model.to(dtype).save_pretrained(folder)
    return folder
