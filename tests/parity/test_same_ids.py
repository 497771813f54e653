"""Kinds of tokenizers x templates x conversations: the same ids in training, generation, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from PIL import Image

from moiie_megatron.config.schema import VisionConfig
from moiie_megatron.data.encode.choose_template import choose_template
from moiie_megatron.data.encode.encoder import encode, encode_prompt
from moiie_megatron.data.encode.templates import Template, load_template
from moiie_megatron.data.encode.tokenizers import Tokenizer, load_tokenizer
from moiie_megatron.data.records.record import PLACEHOLDER, Record, Turn
from moiie_megatron.hf.build_processor import build_processor
from moiie_megatron.hf.processing_moiie import MoiieProcessor
from tests.helpers.tokenizer_kinds import KINDS
from tests.helpers.user_errors import user_error
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
REWRITING: Final = {"phi3": chat_templates.PHI3, "llama3": chat_templates.LLAMA3_FIRST}
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


def parts(text: str) -> str | list[dict[str, Any]]:
    """A string without images; else parts, in which an image has a line of its own."""
    if PLACEHOLDER not in text:
        return text
    result: list[dict[str, Any]] = []
    first, *others = text.split(PLACEHOLDER)
    result.append({"type": "text", "text": first})
    for other in others:
        result += [{"type": "image", "image": IMAGE}, {"type": "text", "text": other[1:]}]
    return result


def as_parts(conversation: Sequence[Turn]) -> list[Turn]:
    """A line feed behind every image, as lists of parts are written."""
    return [
        Turn(turn.role, turn.text.replace("<image>\n", "<image>").replace("<image>", "<image>\n"))
        for turn in conversation
    ]


def learned(pair: Pair, encoded: Any) -> str:
    """What the labels say."""
    return compact(pair.tokenizer.decode([i for i in encoded.labels.tolist() if i != -100]))


def compact(text: str) -> str:
    return "".join(text.split()).lower()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_the_same_everywhere(kind: Path, name: str) -> None:
    pair = Pair(kind, name, TEMPLATES[name])
    for title, conversation in CONVERSATIONS.items():
        with_lines = as_parts(conversation)
        for n, turn in enumerate(conversation):
            if turn.role == "user":
                asked: Sequence[Turn] = conversation[: n + 1]
                assert pair.processed_text(asked) == pair.prompt(asked), title
                asked = with_lines[: n + 1]
                assert pair.processed(asked, True) == pair.prompt(asked), title
        encoded = pair.trained(with_lines)
        ids, types = pair.processed(with_lines, False)
        assert encoded.tokens.tolist() == ids, title
        assert encoded.token_types.tolist() == types, title
        segments = pair.template.render(with_lines)
        answers = "".join(s.text for s in segments if s.train)
        if segments[0].train and pair.tokenizer.bos_id is None:  # no token predicts the first
            assert encoded.labels.tolist() == [*ids[1:], -100]
            continue
        if title == "unicode" and kind.name.startswith(("unigram", "wordpiece")):
            continue  # has no pieces for some characters
        assert learned(pair, encoded) == compact(answers), title
    (kind / "chat_template.jinja").unlink(missing_ok=True)


def test_a_saved_processor_gives_the_same_ids(kind: Path, tmp_path: Path) -> None:
    pair = Pair(kind, "phi3", None)
    pair.processor.save_pretrained(tmp_path)
    again = MoiieProcessor.from_pretrained(tmp_path)
    for title, conversation in CONVERSATIONS.items():
        asked = as_parts(conversation)[:-1]
        assert pair.processed(asked, True, again) == pair.prompt(asked), title


@pytest.mark.parametrize("built_in", REWRITING)
def test_what_cannot_be_trained_is_not_chosen(kind: Path, built_in: str) -> None:
    """Templates that rewrite earlier text: upcycling takes the built-in format, and says so."""
    (kind / "chat_template.jinja").write_text(REWRITING[built_in])
    tokenizer = load_tokenizer(kind)
    (kind / "chat_template.jinja").unlink()
    with user_error("The tokenizer's chat template", "as stage.template"):
        load_template("tokenizer", tokenizer)
    name, sentence = choose_template(tokenizer, "plain")
    assert name in REWRITING and sentence is not None
    load_template(name, tokenizer)
