"""Tiny exports with a chat template: every byte is a token, four image tokens per picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.upcycle import UpcycleOptions, upcycle_checkpoint
from tests.helpers.tiny_hf import write_language, write_vision
from tests.helpers.tiny_tokenizer import PHI3, write_byte_tokenizer

IMAGE_TOKENS = 4
POSITIONS = 160
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def write_checkpoint(folder: Path, positions: int = POSITIONS, **options: Any) -> Path:
    """A checkpoint in fp32 with experts that all differ, in layers 1 and 3."""
    llm = write_language(
        folder / "llm",
        dtype=torch.float32,
        vocab_size=272,
        max_position_embeddings=positions,
        # Large, so that the most likely token does not hang on rounding.
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
    )
    write_byte_tokenizer(llm, PHI3, TEMPLATE, PHI3[1], PHI3[0])
    vision = write_vision(folder / "vision", dtype=torch.float32)
    options = {"perturb": 0.5} | options
    return upcycle_checkpoint(llm, vision, folder / "checkpoint", UpcycleOptions(**options))


def write_export(folder: Path, **options: Any) -> Path:
    """The export of such a checkpoint, which stays at ``folder / "checkpoint"``."""
    return export_checkpoint(write_checkpoint(folder, **options), folder / "export")


def picture(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(text: str, *pictures: Any) -> list[dict[str, Any]]:
    """A conversation of one message, the pictures in front of the text."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": p} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
