"""Chat formats of this project: captions alone, and turns between fixed markers."""

from __future__ import annotations

from collections.abc import Sequence

from moiie_megatron.data.encode.chat_jinja import markers_jinja, plain_jinja
from moiie_megatron.data.encode.segments import Segment
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import PLACEHOLDER, Turn
from moiie_megatron.families.family import ChatFormat
from moiie_megatron.utils.errors import UserError


class PlainTemplate:
    """Image, caption, end of text: LLaVA's format for aligning the connector.

    The caption is the last assistant turn; the human turns are dropped (LLaVA,
    ``preprocess_plain``), so the loss does not depend on how they are worded.
    """

    def __init__(self, tokenizer: Tokenizer, image_token: str = PLACEHOLDER) -> None:
        self._end = tokenizer.special_tokens["eos_token"]
        self.jinja = plain_jinja(bos_text(tokenizer), self._end, image_token)

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

    def __init__(
        self, tokenizer: Tokenizer, chat: ChatFormat, image_token: str = PLACEHOLDER
    ) -> None:
        missing = missing_markers(tokenizer, chat)
        if missing:
            raise UserError(
                f"stage.template is {chat.name} but the tokenizer has no {', '.join(missing)}: "
                "choose the template of the backbone, or plain."
            )
        self._chat = chat
        self.jinja = markers_jinja(chat, bos_text(tokenizer), image_token)

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


def missing_markers(tokenizer: Tokenizer, chat: ChatFormat) -> list[str]:
    """Markers of the format that the vocabulary lacks."""
    return [marker for marker in chat.markers if tokenizer.token_id(marker) is None]


def bos_text(tokenizer: Tokenizer) -> str:
    """The text of the token that is put in front of every sample; may be empty."""
    return "" if tokenizer.bos_id is None else tokenizer.special_tokens["bos_token"]
