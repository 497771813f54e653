"""Records to token ids, labels and token types (shapes: ``moiie_megatron/data/__init__.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moiie_megatron.data.encode.templates import Segment, Template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.llava import PLACEHOLDER, BadRecord, Record, Turn
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.utils.errors import UserError

IGNORE: Final = -100  # label of a position that has no target (PyTorch's ignore_index)


@dataclass(frozen=True)
class Encoded:
    """The token ids of one sample.

    Attributes:
        tokens: int64 (t,).
        labels: int64 (t,), already shifted: ``labels[i]`` is the token that position i must
            predict, or -100.
        token_types: int8 (t,), see ``layout/token_types.py``.
        images: Image paths, in the order of their positions in ``tokens``.
    """

    tokens: Tensor
    labels: Tensor
    token_types: Tensor
    images: tuple[str, ...]


def encode(
    record: Record,
    tokenizer: Tokenizer,
    template: Template,
    num_image_tokens: int,
    sequence_length: int,
) -> Encoded:
    """The training sample of a record, truncated on the right.

    Args:
        record: The conversation.
        tokenizer: Text to ids; its BOS is put in front unless the template already does.
        template: Conversation to text, and which of the text is trainable.
        num_image_tokens: Consecutive positions with ``image_id`` per image.
        sequence_length: Maximum number of tokens.

    Raises:
        BadRecord: Truncation would cut an image or leave no label, or the template cannot render
            the conversation.
    """
    try:
        segments = template.render(record.turns)
    except UserError as error:
        raise BadRecord(str(error)) from error
    ids, trainable, types = _tokenize(segments, tokenizer, num_image_tokens)
    labels = [
        token if train else IGNORE for token, train in zip(ids[1:], trainable[1:], strict=True)
    ] + [IGNORE]
    end = _last_index(types, IMAGE) + 1
    if end > sequence_length:
        raise BadRecord(
            f"the last image ends at token {end}, beyond the sequence length {sequence_length}"
        )
    labels = labels[:sequence_length]
    if all(label == IGNORE for label in labels):
        raise BadRecord(f"no trainable token within the first {len(labels)} of {len(ids)} tokens")
    return Encoded(
        torch.tensor(ids[:sequence_length], dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(types[:sequence_length], dtype=torch.int8),
        record.images,
    )


def encode_prompt(
    turns: Sequence[Turn], tokenizer: Tokenizer, template: Template, num_image_tokens: int
) -> tuple[Tensor, Tensor]:
    """The prompt of the next answer, tokenized exactly as in training.

    Args:
        turns: The conversation so far.
        tokenizer: Text to ids.
        template: Conversation to text.
        num_image_tokens: Consecutive positions with ``image_id`` per image.

    Returns:
        tokens int64 (t,) and token_types int8 (t,).

    Raises:
        UserError: The template cannot render the conversation.
    """
    segments = template.render(turns, add_generation_prompt=True)
    ids, _, types = _tokenize(segments, tokenizer, num_image_tokens)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(types, dtype=torch.int8)


def _tokenize(
    segments: Sequence[Segment], tokenizer: Tokenizer, num_image_tokens: int
) -> tuple[list[int], list[bool], list[int]]:
    """Token ids with BOS in front, whether each is trainable, and token types."""
    ids: list[int] = []
    trainable: list[bool] = []
    types: list[int] = []

    def add(new: list[int], train: bool, token_type: int) -> None:
        ids.extend(new)
        trainable.extend([train] * len(new))
        types.extend([token_type] * len(new))

    for segment in segments:
        for i, text in enumerate(segment.text.split(PLACEHOLDER)):
            if i:
                add([tokenizer.image_id] * num_image_tokens, False, IMAGE)
            if text:
                add(tokenizer.encode(text), segment.train, TEXT)
    if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        return [tokenizer.bos_id, *ids], [False, *trainable], [TEXT, *types]
    return ids, trainable, types


def _last_index(values: list[int], value: int) -> int:
    """Index of the last occurrence, or -1."""
    return len(values) - 1 - values[::-1].index(value) if value in values else -1
