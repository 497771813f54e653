"""The files beside the weights of an exported model: config, processor, remote code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.encode.tokenizers import Tokenizer, load_tokenizer
from moiie_megatron.families.hf_config import language_to_hf, vision_to_hf
from moiie_megatron.hf.auto_files import write_remote_code
from moiie_megatron.hf.build_processor import build_processor
from moiie_megatron.hf.configuration_moiie import MoiieConfig
from moiie_megatron.utils.errors import UserError

_GENERATION = "generation_config.json"
# Runs of white space, case, digits, letters without a piece of their own.
_PROBES = (
    "What is shown here?",
    "  two  spaces,\ttab\n\n    def f(x):\n        return x  ",
    "1234567 3.14 ABC aBc",
    "na\u00efve \u4e2d\u6587 \U0001f600",
)


def model_config(config: RunConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> MoiieConfig:
    """What ``config.json`` says of a checkpoint.

    Raises:
        UserError: A setting that the exported model does not have.
    """
    layout, language = config.moe.layout, config.language
    groups = (layout.num_vision, layout.num_shared, layout.num_text)
    groups = groups if config.moe_layers else (0, 0, 0)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    result = MoiieConfig(
        text_config=language_to_hf(language, ids),
        vision_config=vision_to_hf(config.vision),
        experts=dict(zip(("vision", "shared", "text"), groups, strict=True)),
        num_experts_per_tok=layout.top_k,
        moe_layers=config.moe_layers,
        router_dtype="float32" if config.moe.router_dtype == "fp32" else "model",
        image_token_id=tokenizer.image_id,
        num_image_tokens=config.vision.num_image_tokens,
        vision_feature_layer=config.vision.feature_layer,
        connector_hidden_size=config.connector.hidden_size or language.hidden_size,
        last_image_token_as_text=config.moe.last_image_token_as_text,
        tie_word_embeddings=language.tied_embeddings,
        **ids,
    )
    result.architectures = ["MoiieForConditionalGeneration"]
    result.dtype = dtype
    return result


def write_files(checkpoint: Path, config: RunConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write everything but the weights.

    Args:
        checkpoint: Folder with the tokenizer.
        folder: Where to write.

    Raises:
        UserError: No tokenizer in the checkpoint, or one that transformers reads in another
            way; or see ``model_config``.
    """
    tokenizer = load_tokenizer(checkpoint, config.data.image_token)
    values = model_config(config, tokenizer, dtype)
    values.save_pretrained(folder)
    processor = build_processor(
        checkpoint, config.vision, config.stage.image_mode, config.data.image_token
    )
    _check_same_ids(tokenizer, processor.tokenizer, checkpoint)
    processor.save_pretrained(folder)
    if (checkpoint / _GENERATION).is_file():
        shutil.copy(checkpoint / _GENERATION, folder / _GENERATION)
    else:
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
        content = {key: value for key, value in ids.items() if value is not None}
        (folder / _GENERATION).write_text(json.dumps(content, indent=2) + "\n")
    write_remote_code(folder)


def _check_same_ids(ours: Tokenizer, theirs: Any, checkpoint: Path) -> None:
    """Check the tokenizer: transformers rebuilds a SentencePiece model, not always as it was."""
    for text in _PROBES:
        ids = theirs.encode(text, add_special_tokens=False)
        if ids != ours.encode(text):
            raise UserError(
                f"transformers reads the tokenizer in {checkpoint} in another way than training "
                f"did ({text!r} becomes {ids[:8]} instead of {ours.encode(text)[:8]}): put the "
                "tokenizer.json of the model there."
            )
