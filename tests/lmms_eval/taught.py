"""Teaches a tiny export the scripted answers by heart, so that its scores are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from moiie_megatron.exported.model import ExportedModel
from tests.helpers.tiny_export import write_export

POSITIONS = 512
_STEPS = 300  # about 100 are enough for ten lessons

Lesson = tuple[list[dict[str, Any]], str]  # a conversation and its answer


def write_taught_export(folder: Path, lessons: Sequence[Lesson]) -> Path:
    """An export that answers the conversations as the lessons do.

    Raises:
        AssertionError: It has not learned one of them.
    """
    directory = write_export(folder, positions=POSITIONS)
    exported = ExportedModel.load(directory, device="cpu")
    _teach(exported, lessons)
    said = exported.answer([messages for messages, _ in lessons], max_new_tokens=24)
    assert said == [answer for _, answer in lessons]
    state = {name: tensor.contiguous() for name, tensor in exported.model.state_dict().items()}
    exported.model.save_pretrained(directory, state_dict=state)
    return directory


def _teach(exported: ExportedModel, lessons: Sequence[Lesson]) -> None:
    """Only the language model learns; the pictures' embeddings stay."""
    torch.manual_seed(0)
    prompts = [exported.encode(messages) for messages, _ in lessons]
    inputs = exported.batch(prompts)
    end = exported.model.generation_config.eos_token_id[-1]
    tokenizer = exported.processor.tokenizer
    targets = [[*tokenizer.encode(answer), end] for _, answer in lessons]
    width = max(map(len, targets))
    new = torch.tensor([ids + [end] * (width - len(ids)) for ids in targets])
    counts = torch.tensor([[i < len(ids) for i in range(width)] for ids in targets])
    ids = torch.cat([inputs["input_ids"], new], dim=1)
    types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(new)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    parameters = [
        parameter for name, parameter in exported.model.named_parameters() if "vision" not in name
    ]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.0)
    for _ in range(_STEPS):
        logits = exported.model(
            input_ids=ids,
            mm_token_type_ids=types,
            attention_mask=mask,
            pixel_values=inputs["pixel_values"],
            use_cache=False,
            logits_to_keep=width + 1,
        ).logits[:, :-1]
        loss = cross_entropy(logits[counts], new[counts])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.01:
            break
