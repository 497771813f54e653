"""A checkpoint as the reference's training leaves it: golden weights, vision tower, projector."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_hf import write_tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."


def write_reference(folder: Path, encoder: Path, family: str = "llama") -> Path:
    """Write the directory.

    The tower ends where its features are taken, one layer earlier than the encoder.

    Args:
        encoder: Hugging Face directory of the vision encoder.
    """
    golden = GOLDEN / f"tiny_{family}_moiie"
    weights = load_file(golden / "model.safetensors")
    tower = load_file(encoder / "model.safetensors")
    numbers = [int(m[1]) for name in tower if (m := re.search(r"layers\.(\d+)\.", name))]
    last = f"encoder.layers.{max(numbers)}."
    weights |= {TOWER + n: t.float() for n, t in tower.items() if not n.startswith(last)}
    torch.manual_seed(8)
    image, hidden = tower["post_layernorm.bias"].shape[0], 64
    for name, shape in {
        "0.weight": (24, image),
        "0.bias": (24,),
        "2.weight": (hidden, 24),
        "2.bias": (hidden,),
    }.items():
        weights[PROJECTOR + name] = torch.randn(shape)
    write_tokenizer(folder)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((golden / "config.json").read_text())
    config |= {"mm_vision_tower": str(encoder), "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
