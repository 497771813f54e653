"""A row of the embedding table for the image token, where the vocabulary has none.

Image features take the place of its embedding, so that training needs no row.  But others look up
every id of a prompt, or compare the tokenizer's ids with the rows of the table: an export then has
a row of zeros for it, in embeddings and output layer, and never generates it.  What was added is
left out again when the export is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiie_megatron.config.schema import LanguageConfig
from moiie_megatron.convert.hf.weights_source import WeightsSource
from moiie_megatron.convert.tensor_bytes import TensorBytes
from moiie_megatron.families.transforms import TensorInfo
from moiie_megatron.families.weight_map import VOCABULARY, WeightMapping


def missing_rows(language: LanguageConfig, image_token_id: int) -> int:
    """Rows that an export adds to a model, up to that of its image token; usually 0 or 1."""
    return max(0, image_token_id + 1 - language.vocab_size)


def added_rows(config: Mapping[str, Any]) -> int:
    """Rows behind the trained model's, in an export whose vocabulary still ends with them.

    Args:
        config: Its ``config.json``.
    """
    image, added = config.get("image_token_id"), config.get("num_added_tokens")
    if type(added) is not int or type(image) is not int or not 0 < added <= image:
        return 0
    text = config.get("text_config") or {}
    return added if text.get("vocab_size") == image + 1 else 0


def with_rows(row: WeightMapping, info: TensorInfo, count: int) -> TensorInfo:
    """What becomes of a tensor of this shape."""
    if row.megatron not in VOCABULARY:
        return info
    return TensorInfo((info.shape[0] + count, *info.shape[1:]), info.dtype)


def add_rows(row: WeightMapping, data: TensorBytes, count: int) -> TensorBytes:
    """The tensor with rows of zeros behind the others, if it has one for every token."""
    info = with_rows(row, data.info, count)
    missing = info.num_bytes - data.info.num_bytes
    return TensorBytes(info, [*data.parts, memoryview(bytes(missing))]) if missing else data


def drop_rows(source: WeightsSource, name: str, count: int) -> None:
    """Let a tensor of an export be without its last rows."""
    if count and name in source:
        source.replace(name, {name: (slice(source.shape(name)[0] - count),)})
