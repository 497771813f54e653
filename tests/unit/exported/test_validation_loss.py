"""The loss on held-out samples is the loss that transformers computes for the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.encode.images import normalize
from moiie_megatron.data.stream.build import build_encoding
from moiie_megatron.data.stream.held_out import open_held_out
from moiie_megatron.exported.model import ExportedModel
from moiie_megatron.families.registry import vision_family
from moiie_megatron.generation.checkpoint_config import checkpoint_config
from moiie_megatron.layout.token_types import IMAGE
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.validation.validator import Validator
from moiie_megatron.vlm.build import build_chunks
from tests.helpers.tiny_export import picture

TURNS = (
    ("Which colour?", "Red, mostly.", 1),
    ("Hi.", "Hello there!", 0),
    ("And these?", "One is larger.", 2),
)


def test_an_export_has_the_validation_loss(
    export: Path, model: ExportedModel, context: ParallelContext, tmp_path: Path
) -> None:
    """Each sample on its own, its loss by transformers; then the mean over all label tokens."""
    lines = []
    for number, (question, answer, images) in enumerate(TURNS):
        names = [f"{number}-{i}.png" for i in range(images)]
        for i, name in enumerate(names):
            picture(10 * number + i).save(tmp_path / name)
        turns = [
            {"from": "human", "value": "<image>\n" * images + question},
            {"from": "gpt", "value": answer},
        ]
        lines.append(json.dumps({"image": names, "conversations": turns}))
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines) + "\n")
    source = {"records": str(tmp_path / "held_out.jsonl"), "images": str(tmp_path)}
    overrides = [
        f"data.validation.sources={json.dumps([source])}",
        *("data.num_workers=0", "data.sequence_length=128", "train.device=cpu"),
        *("train.global_batch_size=4", "train.micro_batch_size=2", "train.precision=fp32"),
    ]
    checkpoint = export.parent / "checkpoint"
    config = checkpoint_config(checkpoint, overrides)
    samples = open_held_out(config, build_encoding(config))
    assert samples is not None
    chunks = build_chunks(config, context)
    load_weights(checkpoint, context, chunks)
    result = Validator(config, context, samples).measure(chunks)
    assert result is not None

    statistics = vision_family(config.vision.family).statistics
    total, labels = 0.0, 0
    losses = []
    for number in range(len(TURNS)):
        example = samples[number]
        encoded = example.encoded
        inputs: dict[str, Any] = {
            "input_ids": encoded.tokens.unsqueeze(0),
            "mm_token_type_ids": (encoded.token_types == IMAGE).long().unsqueeze(0),
            # transformers shifts labels itself.
            "labels": F.pad(encoded.labels[:-1], (1, 0), value=IGNORE).unsqueeze(0),
        }
        if len(example.images):
            pixels = normalize(example.images, statistics.mean, statistics.std)
            inputs["pixel_values"] = pixels
        with torch.no_grad():
            loss = float(model.model(**inputs).loss)
        count = int((encoded.labels != IGNORE).sum())
        losses.append(loss)
        total, labels = total + loss * count, labels + count
    assert result.total.label_tokens == labels
    assert result.total.loss == pytest.approx(total / labels, rel=1e-5)
    parts = result.image_counts
    found = [parts[name].loss for name in ("one_image", "text_only", "several_images")]
    assert found == pytest.approx(losses, rel=1e-5)
    assert max(losses) - min(losses) > 0.01
