"""Conversations to text, in segments that are trainable or context.

The tokens of a trainable segment are targets; those of a context segment are only read.  Every
segment is tokenized by itself, so no token spans the border between the two.  An assistant turn is
trainable together with the token that ends it; the header before it is context.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moiie_megatron.config.families import template_names
from moiie_megatron.config.messages import listed
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.llava import PLACEHOLDER, Turn
from moiie_megatron.families.family import ChatFormat
from moiie_megatron.families.registry import chat_formats
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Segment:
    """A piece of rendered text, in which ``<image>`` still marks the images.

    Attributes:
        text: Tokenized by itself.
        train: Whether the tokens of this text are targets.
    """

    text: str
    train: bool


class Template(Protocol):
    """A chat format."""

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        """The segments of a conversation.

        Args:
            turns: The conversation.
            add_generation_prompt: End with the header of the next assistant turn.

        Raises:
            UserError: The format cannot render this conversation.
        """


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """The chat format called ``name`` (``stage.template``).

    Raises:
        UserError: Unknown name, or the tokenizer lacks what the format needs.
    """
    if name == "plain":
        return PlainTemplate(tokenizer)
    if name == "tokenizer":
        return TokenizerTemplate(tokenizer)
    formats = chat_formats()
    if name in formats:
        return MarkerTemplate(tokenizer, formats[name])
    raise UserError(f"stage.template is {name}: use {listed(template_names())}.")


class PlainTemplate:
    """Image, caption, end of text: LLaVA's format for aligning the connector.

    The caption is the last assistant turn; the human turns are dropped (LLaVA,
    ``preprocess_plain``), so the loss does not depend on how they are worded.
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


class MarkerTemplate:
    """A format in which fixed markers surround every turn.

    Raises:
        UserError: The vocabulary lacks a marker.
    """

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat) -> None:
        missing = [marker for marker in chat.markers if tokenizer.token_id(marker) is None]
        if missing:
            raise UserError(
                f"stage.template is {chat.name} but the tokenizer has no {', '.join(missing)}: "
                "choose the template of the backbone, or plain."
            )
        self._chat = chat

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        segments: list[Segment] = []
        chat, context = self._chat, self._chat.begin
        for turn in turns:
            context += self._header(turn.role)
            text = turn.text.strip() if chat.strips else turn.text
            if turn.role == "assistant":
                segments.append(Segment(context, train=False))
                segments.append(Segment(text + chat.end, train=True))
                context = chat.gap
            else:
                context += text + chat.end + chat.gap
        if add_generation_prompt:
            context += self._header("assistant")
        return [*segments, Segment(context, train=False)] if context else segments

    def _header(self, role: str) -> str:
        return self._chat.header.replace("{role}", role)


class TokenizerTemplate:
    """The backbone's own Jinja chat template, rendered in transformers' sandbox.

    The trainable text of an assistant turn is what the rendered text gains after the generation
    prompt.  If a token ends the turn, white space after that token belongs to the next header.

    Templates of reasoning models are rendered without reasoning (``enable_thinking``).  Some then
    write an empty block of reasoning before the last answer only, so the conversation is rendered
    once as a whole, and every answer is trained as it is written there.

    Raises:
        UserError: No chat template, or one that rewrites earlier turns, so that no span can be
            found; checked at construction with a conversation of two rounds.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "stage.template is tokenizer but the tokenizer has no chat template: use "
                f"{_built_in()}."
            )
        self._template = tokenizer.chat_template
        self._special_tokens = tokenizer.special_tokens
        self.render([Turn("user", "a"), Turn("assistant", "b")] * 2, add_generation_prompt=False)

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        segments: list[Segment] = []
        whole = self._text(turns, add_generation_prompt)
        done = 0  # characters that the segments already cover
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            start, trainable = self._answer(turns[: i + 1], whole)
            if start < done:
                raise _rewritten(whole[:done])
            segments.append(Segment(whole[done:start], train=False))
            segments.append(Segment(trainable, train=True))
            done = start + len(trainable)
        rest = whole[done:]
        return [*segments, Segment(rest, train=False)] if rest else segments

    def _answer(self, turns: Sequence[Turn], whole: str) -> tuple[int, str]:
        """Where the answer of the last turn starts in the whole text, and its trainable text."""
        *earlier, turn = turns
        prompt = self._text(earlier, add_generation_prompt=True)
        answered = self._text(turns, add_generation_prompt=False)
        if whole.startswith(prompt) and answered.startswith(prompt):
            trainable = _trainable(turn, answered[len(prompt) :])
            if whole.startswith(trainable, len(prompt)):
                return len(prompt), trainable
        # An earlier answer that is written differently from the last one: search it from the
        # turn's own text on, after the prefix that the prompt and the whole text share.
        before = self._text(earlier, add_generation_prompt=False)
        common = os.path.commonprefix([prompt, whole])
        trainable = _trainable(turn, answered[max(answered.rfind(turn.text.strip()), 0) :])
        start = whole.rfind(trainable, len(before), len(common) + len(trainable))
        if start < 0 or not whole.startswith(before):
            raise _rewritten(prompt)
        return start, trainable

    def _text(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        arguments: dict[str, Any] = {
            **self._special_tokens,
            "chat_template": self._template,
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": False,
        }
        try:
            rendered: Any = render_jinja_template([messages], **arguments)
        except TemplateError as error:
            raise UserError(
                f"The tokenizer's chat template refuses this conversation ({error}): use "
                f"{_built_in()} as stage.template."
            ) from error
        return str(rendered[0][0])  # (texts, spans of {% generation %} blocks)


def _trainable(turn: Turn, added: str) -> str:
    """The trainable part of the text that an answer adds to the conversation.

    White space after the token that ends the turn is not part of it.
    """
    core = added.rstrip()
    return added if core.endswith(turn.text.rstrip()) else core


def _rewritten(text: str) -> UserError:
    return UserError(
        "stage.template is tokenizer but its chat template changes earlier text when a turn is "
        f"added ({text[-40:]!r} is not kept): use {_built_in()}."
    )


def _built_in() -> str:
    return listed(name for name in template_names() if name != "tokenizer")
