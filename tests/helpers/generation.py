"""Tiny models, prompts and exports for tests of generation: the same ones in every process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moiie_megatron.config.schema import MoEConfig, RunConfig
from moiie_megatron.convert.fill_model import fill_model
from moiie_megatron.convert.hf.export_files import model_config
from moiie_megatron.data.encode.images import normalize
from moiie_megatron.families.registry import vision_family
from moiie_megatron.families.weight_map import model_rows
from moiie_megatron.generation.prompt import Prompt
from moiie_megatron.hf.modeling_moiie import MoiieForConditionalGeneration
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.selftest.checks.models import seeded_weights
from moiie_megatron.vlm.build import build_model
from moiie_megatron.vlm.model import MoIIEModel
from tests.parity import tiny

NEW_TOKENS = 5
# (tokens of text before an image, ...) and behind the last one: prompts of 9 to 43 tokens.
SHAPES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((2,), 5),
    ((), 9),
    ((3, 4), 4),
    ((), 30),
    ((1,), 12),
)
# Frequencies far apart, so that a tiny model feels the difference; answers cross position 32.
LONGROPE = {
    "short_factor": [1.0] * 8,
    "long_factor": [0.02] * 8,
    "factor": 1e9,
    "original_max_position_embeddings": 32,
}
LANGUAGES: dict[str, Any] = {
    "llama": tiny.language("llama"),
    "qwen3": tiny.language("qwen3", head_dim=32, qk_norm=True),
    "window": tiny.language("phi3", sliding_window=11),
    "longrope": tiny.language("phi3", longrope=LONGROPE),
}


def run_config(language: str = "llama", variant: str = "moiie", **sections: Any) -> RunConfig:
    """A run of a tiny model, by the name of its language model and its variant."""
    moe = sections.pop("moe", {})
    return tiny.run_config(
        LANGUAGES[language],
        MoEConfig(variant=variant, **moe),
        **sections,  # type: ignore[arg-type]
    )


def prompts(config: RunConfig, shapes: Sequence[Any] = SHAPES) -> list[Prompt]:
    """Random text and images; no two alike."""
    generator = torch.Generator().manual_seed(5)
    p, side, made = config.vision.num_image_tokens, config.vision.image_size, []
    for before, behind in shapes:
        types = [kind for n in before for kind in (*[TEXT] * n, *[IMAGE] * p)] + [TEXT] * behind
        tokens = torch.randint(config.language.vocab_size, (len(types),), generator=generator)
        images = torch.randint(256, (len(before), 3, side, side), generator=generator).byte()
        made.append(Prompt(tokens, torch.tensor(types, dtype=torch.int8), images))
    return made


def model(config: RunConfig, context: ParallelContext) -> MoIIEModel:
    """This rank's part of the model."""
    built = build_model(config, context).eval()
    fill_model(built, seeded_weights(config))
    return built


def exported(config: RunConfig, folder: Path) -> MoiieForConditionalGeneration:
    """The same model in transformers."""
    weights = seeded_weights(config)
    tensors: dict[str, Tensor] = {}
    for row in model_rows(config):
        full = weights(row.megatron, row.expert)
        assert full is not None
        for name, part in zip(row.hf, row.transform.to_hf(full), strict=True):
            tensors[name] = part.clone().contiguous()
    ids: Any = SimpleNamespace(image_id=1, bos_id=None, eos_id=None, pad_id=0)
    model_config(config, ids, [], torch.float32).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded: Any = MoiieForConditionalGeneration.from_pretrained(folder)
    return loaded.eval()


@torch.no_grad()
def exported_answer(
    config: RunConfig, hf_model: Any, prompt: Prompt, count: int = NEW_TOKENS
) -> tuple[list[int], Tensor]:
    """Greedy tokens of the export with its cache, and the scores that they were chosen from.

    Returns:
        ``count`` ids, and ``(count, vocabulary)``.
    """
    statistics = vision_family(config.vision.family).statistics
    images = {}
    if len(prompt.images):
        images["pixel_values"] = normalize(prompt.images, statistics.mean, statistics.std)
    output = hf_model.generate(
        input_ids=prompt.tokens[None],
        attention_mask=torch.ones_like(prompt.tokens)[None],
        mm_token_type_ids=(prompt.token_types == IMAGE)[None].long(),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **images,
    )
    ids: list[int] = output.sequences[0, len(prompt.tokens) :].tolist()
    return ids, torch.cat(output.logits)
