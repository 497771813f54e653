"""The files beside the weights of an exported model: config, processor, remote code."""

from __future__ import annotations

import json
from collections.abc import Collection
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.convert.hf.generation_config import generation_config
from moiie_megatron.convert.hf.image_row import missing_rows
from moiie_megatron.data.encode.chat_jinja import name_in
from moiie_megatron.data.encode.choose_template import choose_template
from moiie_megatron.data.encode.encoder import encode_prompt
from moiie_megatron.data.encode.stop_ids import GENERATION_FILE, learned_end, stop_ids
from moiie_megatron.data.encode.templates import Template, load_template
from moiie_megatron.data.encode.tokenizer_template import UnusableTemplate
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import PLACEHOLDER, Turn
from moiie_megatron.families.hf_config import language_to_hf, vision_to_hf
from moiie_megatron.hf.auto_files import write_remote_code
from moiie_megatron.hf.build_processor import build_processor
from moiie_megatron.hf.configuration_moiie import MoiieConfig
from moiie_megatron.utils.errors import UserError

# Runs of white space, case, digits, letters without a piece of their own.
_PROBES = (
    "What is shown here?",
    "  two  spaces,\ttab\n\n    def f(x):\n        return x  ",
    "1234567 3.14 ABC aBc",
    "na\u00efve \u4e2d\u6587 \U0001f600",
)


def model_config(
    config: RunConfig, tokenizer: Tokenizer, stop: Collection[int], dtype: torch.dtype
) -> MoiieConfig:
    """What ``config.json`` says of a checkpoint.

    Args:
        config: The run's.
        tokenizer: Gives the ids of special tokens.
        stop: Ids that end an answer.
        dtype: Of the weights.

    Raises:
        UserError: A setting that the exported model does not have.
    """
    layout, language = config.moe.layout, config.language
    groups = (layout.num_vision, layout.num_shared, layout.num_text)
    groups = groups if config.moe_layers else (0, 0, 0)
    ids = _special_ids(tokenizer, stop)
    text, added = language_to_hf(language, ids), missing_rows(language, tokenizer.image_id)
    text.vocab_size += added
    result = MoiieConfig(
        text_config=text,
        vision_config=vision_to_hf(config.vision),
        experts=dict(zip(("vision", "shared", "text"), groups, strict=True)),
        num_experts_per_tok=layout.top_k,
        moe_layers=config.moe_layers,
        router_dtype="float32" if config.moe.router_dtype == "fp32" else "model",
        image_token_id=tokenizer.image_id,
        num_added_tokens=added,
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


def write_files(
    checkpoint: Path, config: RunConfig, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype
) -> list[str]:
    """Write everything but the weights.

    Args:
        checkpoint: Folder with the tokenizer.
        config: The run's.
        tokenizer: Its tokenizer.
        folder: Where to write.
        dtype: Of the weights.

    Returns:
        Sentences about what the export cannot promise, or leaves out.

    Raises:
        UserError: A tokenizer that transformers reads in another way; or see ``model_config``.
    """
    image_token = config.data.image_token
    template, notes = _template(config.stage.template, tokenizer, image_token)
    stop = stop_ids(tokenizer, template, checkpoint)
    model_config(config, tokenizer, stop, dtype).save_pretrained(folder)
    processor = build_processor(
        checkpoint, config.vision, config.stage.image_mode, image_token, template.jinja, stop
    )
    _check_same_ids(tokenizer, processor.tokenizer, checkpoint)
    processor.save_pretrained(folder)
    generation, left_out = generation_config(
        checkpoint, _special_ids(tokenizer, stop), config.language.vocab_size
    )
    (folder / GENERATION_FILE).write_text(json.dumps(generation, indent=2) + "\n")
    write_remote_code(folder)
    if name_in(template.jinja) == "plain":
        notes.append(
            "The chat template is plain, as in training: it writes the images and no questions."
        )
    if learned_end(tokenizer, template) is None:
        notes.append(
            "The chat template writes nothing behind an answer, so training does not teach where "
            "one ends: limit max_new_tokens."
        )
    return [*notes, *left_out, *_other_prompts(tokenizer, template, processor)]


def _template(name: str, tokenizer: Tokenizer, image_token: str) -> tuple[Template, list[str]]:
    """The format of the training; another one for a model that cannot have been trained in it."""
    try:
        return load_template(name, tokenizer, image_token), []
    except UserError as error:
        reason = error.reason if isinstance(error, UnusableTemplate) else str(error)
        try:
            chosen, _ = choose_template(tokenizer, "plain")
        except UserError:
            chosen = "plain"
        note = (
            f"The chat template of the export is {chosen}, for stage.template {name} cannot be "
            f"used: {reason}"
        )
        return load_template(chosen, tokenizer, image_token), [note]


def _special_ids(tokenizer: Tokenizer, stop: Collection[int]) -> dict[str, Any]:
    """``eos_token_id`` is a number, or a list that begins with the tokenizer's."""
    ends = sorted(stop, key=lambda i: (i != tokenizer.eos_id, i))
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad_id,
    }


def _other_prompts(tokenizer: Tokenizer, template: Template, processor: Any) -> list[str]:
    """A sentence if the processor's ids of a conversation are not those of training."""
    for texts in (("What is shown here?",), ("a", "  b\n", "c")):
        turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
        messages: list[dict[str, Any]] = [{"role": t.role, "content": t.text} for t in turns]
        parts = [{"type": "image"}, {"type": "text", "text": turns[-1].text}]
        messages[-1]["content"] = parts
        turns[-1] = Turn("user", f"{PLACEHOLDER}\n{turns[-1].text}")
        try:
            want = encode_prompt(turns, tokenizer, template, num_image_tokens=1)[0].tolist()
        except UserError:  # the template takes no such conversation
            continue
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        got = processor.tokenizer.encode(text, add_special_tokens=False)
        if got != want:
            at = next(i for i, pair in enumerate(zip_longest(got, want)) if pair[0] != pair[1])
            return [
                f"The processor of the export writes prompts with other ids than training does "
                f"(position {at}: {got[at : at + 4]} instead of {want[at : at + 4]}), so answers "
                "may be worse than before the export."
            ]
    return []


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
