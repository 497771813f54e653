"""Records to token ids, labels and token types (shapes: ``moiie_megatron/data/__init__.py``)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from moiie_megatron.data.encode.templates import Segment, Template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import PLACEHOLDER, BadRecord, Record, Turn
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
        markers: Special tokens that stand in the text of the turns and became their ids as if
            the template had written them; each once, sorted.
    """

    tokens: Tensor
    labels: Tensor
    token_types: Tensor
    images: tuple[str, ...]
    markers: tuple[str, ...] = ()


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
        segments = template.render(_quoted(record.turns, tokenizer))
        ids, trainable, types = _tokenize(segments, tokenizer, num_image_tokens)
    except BadRecord:
        raise
    except UserError as error:
        raise BadRecord(str(error)) from error
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
        find_markers(record.turns, tokenizer),
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
    segments = template.render(_quoted(turns, tokenizer), add_generation_prompt=True)
    ids, _, types = _tokenize(segments, tokenizer, num_image_tokens)
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(types, dtype=torch.int8)


def find_markers(turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Special tokens in the text of turns that become their ids; each once, sorted."""
    texts = (turn.text for turn in _quoted(turns, tokenizer))
    return tuple(sorted({marker for text in texts for marker in tokenizer.markers.findall(text)}))


def _quoted(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[Turn]:
    """The turns as templates get them; placeholders of images stay."""
    return [
        replace(turn, text=PLACEHOLDER.join(map(tokenizer.quote, turn.text.split(PLACEHOLDER))))
        for turn in turns
    ]


def _tokenize(
    segments: Sequence[Segment], tokenizer: Tokenizer, num_image_tokens: int
) -> tuple[list[int], list[bool], list[int]]:
    """Token ids with BOS in front, whether each is trainable, and token types.

    The conversation is encoded as one text, as transformers' ``apply_chat_template`` does: where
    a token begins and whether a word gets a dummy prefix depends on what stands around it.
    """
    # Processors repeat the image token in the text; ids do not depend on how often beyond twice.
    copies = min(num_image_tokens, 2)
    text, spans, num_images = _joined(segments, tokenizer, copies)
    found, offsets = tokenizer.encode_with_offsets(text)
    if found.count(tokenizer.image_id) != num_images * copies:
        raise UserError(
            f"a turn has the image token {tokenizer.image_token} in its text: write {PLACEHOLDER} "
            "for an image, or set data.markers_in_text to text"
        )
    ids: list[int] = []
    trainable: list[bool] = []
    types: list[int] = []
    seen = 0
    for token, train in zip(found, _trainable(text, offsets, spans), strict=True):
        if token != tokenizer.image_id:
            ids.append(token)
            trainable.append(train)
            types.append(TEXT)
            continue
        if seen % copies == 0:
            ids += [token] * num_image_tokens
            trainable += [False] * num_image_tokens
            types += [IMAGE] * num_image_tokens
        seen += 1
    return ids, trainable, types


def _joined(
    segments: Sequence[Segment], tokenizer: Tokenizer, copies: int
) -> tuple[str, list[tuple[int, int]], int]:
    """The text with BOS and image tokens, where it is trainable, and its number of images."""
    image = tokenizer.image_token * copies
    bos = tokenizer.special_tokens.get("bos_token", "")
    whole = "".join(segment.text for segment in segments)
    parts = [] if whole.startswith(bos) else [bos]
    length = sum(map(len, parts))
    spans = []
    for segment in segments:
        parts.append(segment.text.replace(PLACEHOLDER, image))
        end = length + len(parts[-1])
        if segment.train:
            spans.append((length, end))
        length = end
    return "".join(parts), spans, whole.count(PLACEHOLDER)


def _trainable(
    text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[bool]:
    """Whether the characters of each token are trainable.

    As in transformers' assistant masks, one such character suffices; but white space that a token
    takes along counts only in tokens of white space alone.  So the first word of an answer is
    learned although its token includes the space of the header, and a marker that takes the white
    space behind it is not learned with the answer that begins with a space.
    """
    result = [False] * len(offsets)
    starts = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    for start, end in spans:
        first = bisect_right(ends, start)
        while first and starts[first - 1] == start:  # tokens without characters
            first -= 1
        last = bisect_left(starts, end)
        result[first:last] = [True] * (last - first)
        for i in range(first, last):
            if starts[i] >= start:
                break
            result[i] = _is_inside(text, offsets[i], start, end)
        for i in reversed(range(first, last)):
            if ends[i] <= end:
                break
            result[i] = _is_inside(text, offsets[i], start, end)
    return result


def _is_inside(text: str, token: tuple[int, int], start: int, end: int) -> bool:
    """Whether characters of a token other than white space at its ends are in a span."""
    characters = text[slice(*token)]
    core = characters.strip()
    if not core:
        return True
    first = token[0] + characters.index(core)
    return first < end and first + len(core) > start


def _last_index(values: list[int], value: int) -> int:
    """Index of the last occurrence, or -1."""
    return len(values) - 1 - values[::-1].index(value) if value in values else -1
