"""What a chat format makes of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moiie_megatron.data.records.record import Turn


@dataclass(frozen=True)
class Segment:
    """A piece of rendered text, in which ``<image>`` still marks the images.

    Attributes:
        text: Part of the conversation's text.
        train: Whether the tokens of this text are targets.
    """

    text: str
    train: bool


class Template(Protocol):
    """A chat format.

    Attributes:
        jinja: The same format as a chat template for transformers, which an export carries.  It
            writes the joined segments, with the tokenizer's BOS in front.
    """

    jinja: str

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[Segment]:
        """The segments of a conversation.

        Args:
            turns: The conversation.
            add_generation_prompt: End with the header of the next assistant turn.

        Raises:
            UserError: The format cannot render this conversation.
        """
