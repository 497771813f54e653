"""Conversations to text, in segments that say which text the model learns to write.

A segment is tokenised by itself, so the border between what is read and what is learnt never
falls inside a token.  Every assistant turn is learnt together with the token that ends it; the
header before it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.llava import PLACEHOLDER, Turn
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Segment:
    """A piece of rendered text; ``<image>`` still stands for an image.

    Attributes:
        text: To be tokenised by itself.
        train: The tokens of this text are targets.
    """

    text: str
    train: bool


class Template(Protocol):
    """A chat format."""

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        """The segments of a conversation.

        Args:
            turns: The conversation.
            add_generation_prompt: End with the header of an assistant turn still to be written.

        Raises:
            UserError: The format cannot express this conversation.
        """


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """The chat format called ``name`` (``stage.template``).

    Raises:
        UserError: Unknown name, or the tokenizer lacks what the format needs.
    """
    if name == "plain":
        return PlainTemplate(tokenizer)
    if name == "llama3":
        return Llama3Template(tokenizer)
    if name == "phi3":
        return Phi3Template(tokenizer)
    if name == "tokenizer":
        return TokenizerTemplate(tokenizer)
    raise UserError(f"stage.template is {name}: use plain, llama3, phi3 or tokenizer.")


class PlainTemplate:
    """Image, caption, end of text: LLaVA's format for aligning the connector.

    What the human asked is dropped; the caption is the last assistant turn (LLaVA,
    ``preprocess_plain``).  Text before the caption would let the loss depend on the wording.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._end = tokenizer.special_tokens["eos_token"]

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        images = sum(turn.text.count(PLACEHOLDER) for turn in turns)
        segments = [Segment(PLACEHOLDER * images, train=False)] if images else []
        captions = [turn.text for turn in turns if turn.role == "assistant"]
        if captions and not add_generation_prompt:
            caption = captions[-1].replace(PLACEHOLDER, "").strip()
            segments.append(Segment(caption + self._end, train=True))
        return segments


class _MarkerTemplate:
    """Formats in which fixed markers surround every turn."""

    name: str
    begin: str
    markers: tuple[str, ...]  # must be single tokens of the vocabulary
    end: str  # ends a turn and is learnt after an assistant turn
    gap: str  # between the end of a turn and the next header

    def __init__(self, tokenizer: Tokenizer) -> None:
        missing = [m for m in self.markers if tokenizer.token_id(m) is None]
        if missing:
            raise UserError(
                f"stage.template is {self.name} but the tokenizer has no {', '.join(missing)}: "
                "choose the template of the backbone, or plain."
            )

    def header(self, role: str) -> str:
        raise NotImplementedError

    def content(self, text: str) -> str:
        return text

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        segments: list[Segment] = []
        read = self.begin
        for turn in turns:
            read += self.header(turn.role)
            if turn.role == "assistant":
                segments.append(Segment(read, train=False))
                segments.append(Segment(self.content(turn.text) + self.end, train=True))
                read = self.gap
            else:
                read += self.content(turn.text) + self.end + self.gap
        if add_generation_prompt:
            read += self.header("assistant")
        return [*segments, Segment(read, train=False)] if read else segments


class Llama3Template(_MarkerTemplate):
    """Llama-3 Instruct (Meta's model card, "Prompt format"); turns are stripped as there."""

    name = "llama3"
    begin = "<|begin_of_text|>"
    markers = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    end = "<|eot_id|>"
    gap = ""

    def header(self, role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    def content(self, text: str) -> str:
        return text.strip()


class Phi3Template(_MarkerTemplate):
    """Phi-3 (microsoft/Phi-3-mini-4k-instruct, "Chat Format"); ``<|system|>`` only if used."""

    name = "phi3"
    begin = ""
    markers = ("<|user|>", "<|assistant|>", "<|end|>")
    end = "<|end|>"
    gap = "\n"

    def header(self, role: str) -> str:
        return f"<|{role}|>\n"


class TokenizerTemplate:
    """The backbone's own Jinja chat template, rendered in transformers' sandbox.

    An assistant turn is what the text grows by after the generation prompt.  Where an end-of-turn
    token follows the turn, white space after that token belongs to the next header.

    Raises:
        UserError: No chat template, or one that rewrites earlier turns (then no span can be
            found); checked at construction on a conversation of two rounds.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "stage.template is tokenizer but the tokenizer has no chat template: use llama3, "
                "phi3 or plain."
            )
        self._template = tokenizer.chat_template
        self._special_tokens = tokenizer.special_tokens
        self.render([Turn("user", "a"), Turn("assistant", "b")] * 2, add_generation_prompt=False)

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        segments: list[Segment] = []
        done = ""  # text that the segments already cover
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._text(turns[:i], add_generation_prompt=True)
            answer = self._text(turns[: i + 1], add_generation_prompt=False)
            segments.append(Segment(self._growth(done, prompt), train=False))
            span = self._growth(prompt, answer)
            core = span.rstrip()
            trainable = span if core.endswith(turn.text.rstrip()) else core
            segments.append(Segment(trainable, train=True))
            done = prompt + trainable
        rest = self._growth(done, self._text(turns, add_generation_prompt))
        return [*segments, Segment(rest, train=False)] if rest else segments

    def _growth(self, before: str, after: str) -> str:
        if not after.startswith(before):
            raise UserError(
                "stage.template is tokenizer but its chat template changes earlier text when a "
                f"turn is added ({before[-40:]!r} is not kept): use llama3, phi3 or plain."
            )
        return after[len(before) :]

    def _text(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        arguments: dict[str, Any] = {
            **self._special_tokens,
            "chat_template": self._template,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            rendered: Any = render_jinja_template([messages], **arguments)
        except TemplateError as error:
            raise UserError(
                f"The tokenizer's chat template refuses this conversation ({error}): use llama3, "
                "phi3 or plain as stage.template."
            ) from error
        return str(rendered[0][0])  # (texts, spans of {% generation %} blocks)
