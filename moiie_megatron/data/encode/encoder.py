"""Records to token ids, targets and token types."""

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

IGNORE: Final = -100  # label of a position without a target (PyTorch's ignore_index)


@dataclass(frozen=True)
class Encoded:
    """One sample as ids.

    Attributes:
        tokens: int64 [n].
        labels: int64 [n], already shifted: ``labels[t]`` is the token that position ``t`` must
            predict, or -100.
        token_types: int8 [n].
        images: Image paths, in the order of their runs in ``tokens``.
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
    """A training sample; text beyond ``sequence_length`` is cut off at the right.

    Args:
        record: The conversation.
        tokenizer: Gives the ids; its BOS is put in front unless the template already does.
        template: Gives the text and which of it is learnt.
        num_image_tokens: Length of the run of ``image_id`` that stands for one image.
        sequence_length: Largest number of tokens.

    Raises:
        BadRecord: An image does not fit whole, nothing is left to learn, or the template cannot
            express the conversation.
    """
    try:
        segments = template.render(record.turns)
    except UserError as error:
        raise BadRecord(str(error)) from error
    ids, trainable, types = _tokenize(segments, tokenizer, num_image_tokens)
    labels = [
        token if train else IGNORE for token, train in zip(ids[1:], trainable[1:], strict=True)
    ] + [IGNORE]
    end = _last(types, IMAGE) + 1
    if end > sequence_length:
        raise BadRecord(
            f"the last image ends at token {end}, beyond the sequence length {sequence_length}"
        )
    labels = labels[:sequence_length]
    if all(label == IGNORE for label in labels):
        raise BadRecord(f"no answer to learn within the first {len(labels)} of {len(ids)} tokens")
    return Encoded(
        torch.tensor(ids[:sequence_length], dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(types[:sequence_length], dtype=torch.int8),
        record.images,
    )


def encode_prompt(
    turns: Sequence[Turn], tokenizer: Tokenizer, template: Template, num_image_tokens: int
) -> tuple[Tensor, Tensor]:
    """What the model reads before it writes its answer, tokenised exactly as in training.

    Returns:
        tokens int64 [n] and token_types int8 [n].

    Raises:
        UserError: The template cannot express the conversation.
    """
    segments = template.render(turns, add_generation_prompt=True)
    ids, _, types = _tokenize(segments, tokenizer, num_image_tokens)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(types, dtype=torch.int8)


def _tokenize(
    segments: Sequence[Segment], tokenizer: Tokenizer, num_image_tokens: int
) -> tuple[list[int], list[bool], list[int]]:
    """Ids, whether each is learnt, and token types, with BOS in front."""
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


def _last(values: list[int], wanted: int) -> int:
    """Position of the last occurrence, or -1."""
    return len(values) - 1 - values[::-1].index(wanted) if wanted in values else -1
