"""Conversations in chat templates and tokenizers, and the ids that training gives them.

``write_cases`` writes them down for programs without this project: each combination as a directory
that has all of an export but the weights, and ``cases.json`` with messages and ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from moiie_megatron.config.schema import VisionConfig
from moiie_megatron.data.encode.encoder import encode, encode_prompt
from moiie_megatron.data.encode.templates import Template, load_template
from moiie_megatron.data.encode.tokenizers import Tokenizer, load_tokenizer
from moiie_megatron.data.records.record import PLACEHOLDER, Record, Turn
from moiie_megatron.families.hf_config import language_to_hf, vision_to_hf
from moiie_megatron.hf.auto_files import write_remote_code
from moiie_megatron.hf.build_processor import build_processor
from moiie_megatron.hf.configuration_moiie import MoiieConfig
from moiie_megatron.hf.processing_moiie import MoiieProcessor
from tests.helpers.tokenizer_kinds import KINDS
from tests.parity import tiny
from tests.unit.data.encode import chat_templates

TEMPLATES: Final = {
    "plain": None,
    "phi3": None,
    "llama3": None,
    "chatml": chat_templates.CHATML % ("", ""),
    "llama3.2": chat_templates.LLAMA32,
    "mistral": chat_templates.MISTRAL,
    "parts": chat_templates.PARTS,
}
IMAGE: Final = Image.new("RGB", (9, 7), "red")


def turns(*texts: str, system: str | None = None) -> tuple[Turn, ...]:
    spoken = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return (Turn("system", system), *spoken) if system is not None else tuple(spoken)


CONVERSATIONS: Final = {
    "one round": turns("What is on the bus?", "A red dog."),
    "rounds": turns("Is it 7?", "It is 7.", "Or 3?", "no", "So?", "Yes, and more."),
    "system": turns("What is it?", "A bus.", system="Be brief."),
    "image first": turns("<image>\nWhat is on the bus?", "A dog.", "And?", "Two dogs."),
    "images": turns("<image>\n<image>\nWhat is <image>\nit or <image>", "7", "<image>", "3"),
    "white space": turns("  two  dogs \n", " \n Yes  \n", "\n\nIs it?\t", "  no "),
    "unicode": turns("caf\u00e9 \u4e2d\u6587?", "\U0001f600 na\u00efve", "\u00e9", "\u00a0\u6587"),
}  # fmt: skip


class Pair:
    """A tokenizer and a template, as training has them and as an export has them."""

    def __init__(self, folder: Path, name: str, chat_template: str | None) -> None:
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template)
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.template: Template = load_template(
            name if chat_template is None else "tokenizer", self.tokenizer
        )
        self.vision: VisionConfig = tiny.vision()
        self.processor: MoiieProcessor = build_processor(
            folder, self.vision, "square", chat_template=self.template.jinja
        )

    def prompt(self, conversation: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Ids and types that generation starts from."""
        ids, types = encode_prompt(
            conversation, self.tokenizer, self.template, self.vision.num_image_tokens
        )
        return ids.tolist(), types.tolist()

    def trained(self, conversation: Sequence[Turn]) -> Any:
        images = sum(turn.text.count(PLACEHOLDER) for turn in conversation)
        record = Record("r", ("x",) * images, tuple(conversation))
        n = self.vision.num_image_tokens
        return encode(record, self.tokenizer, self.template, n, 9999)

    def processed(
        self, conversation: Sequence[Turn], add_generation_prompt: bool, processor: Any = None
    ) -> tuple[list[int], list[int]]:
        """Ids and types of an exported model, its contents lists of parts where they can be."""
        inputs = (processor or self.processor).apply_chat_template(
            [{"role": turn.role, "content": parts(turn.text)} for turn in conversation],
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
        )
        return inputs["input_ids"][0], inputs["mm_token_type_ids"][0]

    def processed_text(self, conversation: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """The same with strings, in two steps."""
        messages = [{"role": turn.role, "content": turn.text} for turn in conversation]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [IMAGE] * text.count(PLACEHOLDER)
        inputs = self.processor(text=text, images=images or None, add_special_tokens=False)
        return inputs["input_ids"][0], inputs["mm_token_type_ids"][0]


def parts(text: str, image: Any = IMAGE) -> str | list[dict[str, Any]]:
    """A string without images; else parts, in which an image has a line of its own."""
    if PLACEHOLDER not in text:
        return text
    result: list[dict[str, Any]] = []
    first, *others = text.split(PLACEHOLDER)
    result.append({"type": "text", "text": first})
    for other in others:
        result += [{"type": "image", "image": image}, {"type": "text", "text": other[1:]}]
    return result


def as_parts(conversation: Sequence[Turn]) -> list[Turn]:
    """A line feed behind every image, as lists of parts are written."""
    return [
        Turn(turn.role, turn.text.replace("<image>\n", "<image>").replace("<image>", "<image>\n"))
        for turn in conversation
    ]


def write_cases(
    folder: Path, kinds: Collection[str] = tuple(KINDS), names: Collection[str] = tuple(TEMPLATES)
) -> Path:
    """Write every combination of these tokenizers and templates, and what they must give.

    Returns:
        ``cases.json``, a list of objects: ``directory`` (its name in ``folder``), ``conversation``
        (its title), ``messages`` (with parts; the picture of every image part is ``image.png`` in
        ``folder``), ``ids`` and ``types`` of the prompt, as training and ``generate.py`` have them.
    """
    cases = []
    folder.mkdir(parents=True, exist_ok=True)
    IMAGE.save(folder / "image.png")
    for kind in kinds:
        for name in names:
            directory = folder / f"{kind}-{name}"
            tokenizer = directory / "tokenizer"
            tokenizer.mkdir(parents=True)
            pair = Pair(KINDS[kind](tokenizer), name, TEMPLATES[name])
            pair.processor.save_pretrained(directory)
            _config(pair).save_pretrained(directory)
            write_remote_code(directory)
            for title, conversation in CONVERSATIONS.items():
                asked = as_parts(conversation)[:-1]
                ids, types = pair.prompt(asked)
                messages = [
                    {"role": turn.role, "content": parts(turn.text, "image.png")} for turn in asked
                ]
                case = {"directory": directory.name, "conversation": title, "messages": messages}
                cases.append({**case, "ids": ids, "types": types})
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    return file


def _config(pair: Pair) -> MoiieConfig:
    """A tiny model with a row for every id."""
    rows = pair.processor.image_token_id + 1
    language = tiny.language("llama").model_copy(update={"vocab_size": rows})
    config = MoiieConfig(
        text_config=language_to_hf(language),
        vision_config=vision_to_hf(pair.vision),
        experts={"vision": 1, "shared": 2, "text": 1},
        moe_layers=[1],
        image_token_id=pair.processor.image_token_id,
        eos_token_id=pair.tokenizer.eos_id,
        pad_token_id=pair.tokenizer.pad_id,
        bos_token_id=pair.tokenizer.bos_id,
    )
    config.architectures = ["MoiieForConditionalGeneration"]
    return config
