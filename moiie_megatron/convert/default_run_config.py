"""The configuration in a converted checkpoint: a run that could start from it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from moiie_megatron.config import yaml_text
from moiie_megatron.config.load import load_saved_config
from moiie_megatron.config.schema import LanguageConfig, MoEConfig, RunConfig, VisionConfig
from moiie_megatron.data.encode.choose_template import choose_template
from moiie_megatron.data.encode.tokenizers import load_tokenizer
from moiie_megatron.families.registry import language_family

_SEQUENCE_LENGTH = 4096


def run_from_checkpoint(
    checkpoint: Path,
    *,
    language: LanguageConfig,
    vision: VisionConfig,
    connector_size: int | None,
    moe: MoEConfig,
    template: str,
    dtype: torch.dtype,
    seed: int,
) -> RunConfig:
    """A run that starts from the checkpoint and uses its tokenizer.

    The values are those of the recipe's second stage; ``data.sources`` is left empty.

    Args:
        template: ``stage.template``.
        dtype: Of the language model's weights.

    Raises:
        UserError: Sizes that no run can have.
    """
    is_moe = moe.variant != "dense"
    values: dict[str, Any] = {
        "output": str(checkpoint) + "-run",
        "language": language.model_dump() | {"pretrained": None},
        "vision": vision.model_dump() | {"pretrained": None},
        "connector": {"hidden_size": connector_size},
        "moe": moe.model_dump(),
        "stage": {"preset": "stage-joint" if is_moe else "stage-dense", "template": template},
        "data": {
            "sources": [],
            "tokenizer": str(checkpoint),
            "sequence_length": min(_SEQUENCE_LENGTH, language.max_position_embeddings),
        },
        "train": {
            "global_batch_size": 128,
            "epochs": 1.0,
            "precision": "fp32" if dtype == torch.float32 else "bf16",
            "seed": seed,
        },
        "checkpoint": {"init_from": str(checkpoint)},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml_text.write(values))
        return load_saved_config(file)


def template_of(llm: Path, language: LanguageConfig) -> tuple[str, str | None]:
    """``stage.template``, and a sentence where it is not the tokenizer's own template.

    Raises:
        UserError: See ``choose_template``.
    """
    default = language_family(language.family).default_template
    return choose_template(load_tokenizer(llm), default)
