"""How a run turns records into token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moiie_megatron.data.encode.encoder import IGNORE, Encoded, encode, find_markers
from moiie_megatron.data.encode.templates import Template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import Record

_UNLIMITED: Final = 2**40  # tokens


@dataclass(frozen=True)
class Encoding:
    """Everything besides the record that the token ids of a sample depend on.  Picklable.

    Attributes:
        tokenizer: Text to ids.
        template: Conversation to text.
        num_image_tokens: Positions per image.
        sequence_length: Maximum number of tokens of a sample.
    """

    tokenizer: Tokenizer
    template: Template
    num_image_tokens: int
    sequence_length: int

    def encode(self, record: Record) -> Encoded:
        """The training sample of a record, truncated to ``sequence_length``.

        Raises:
            BadRecord: See ``encoder.encode``.
        """
        return self._encode(record, self.sequence_length)

    def measure(self, record: Record) -> tuple[int, int]:
        """Number of tokens of a record before truncation, and of its labels after it.

        Raises:
            BadRecord: The template cannot render the conversation, or it has no answer.
        """
        whole = self._encode(record, _UNLIMITED)
        labels = whole.labels[: self.sequence_length]
        return len(whole.tokens), int((labels != IGNORE).sum())

    def markers(self, record: Record) -> tuple[str, ...]:
        """Special tokens in the text of a record that become their ids (``Encoded.markers``)."""
        return find_markers(record.turns, self.tokenizer)

    def _encode(self, record: Record, sequence_length: int) -> Encoded:
        return encode(record, self.tokenizer, self.template, self.num_image_tokens, sequence_length)
