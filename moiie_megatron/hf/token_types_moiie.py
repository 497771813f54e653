"""Which token types belong to the positions of a step.

``mm_token_type_ids`` of the whole sequence reach the model where only a part of it is computed:
``generate`` of transformers before 5.23 does not cut them, and no version extends them for the
candidates of assisted decoding.  Types of another length would be broadcast, or fall on the
neighbours, and choose wrong experts without an error.

Shapes: B batch, S positions of the step.
"""

from __future__ import annotations

from .version_moiie import TESTED_VERSIONS  # noqa: F401  # first: older versions lack names

# isort: split

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

IMAGE = 1  # in mm_token_type_ids; text and padding are 0


def types_of_step(types: Tensor, shape: torch.Size, cache: Cache | None) -> Tensor:
    """The types ``(B, S)`` of a step, which may come with those of all positions before it.

    Args:
        types: ``(B, S)`` or longer.
        shape: ``(B, S)``.
        cache: Of the positions before this step.

    Raises:
        ValueError: Fewer types than positions, types of positions behind the step, or another
            batch size.
    """
    if types.shape == shape:
        return types
    length = shape[1]
    if types.ndim == 2 and types.shape[0] == shape[0] and types.shape[1] > length:
        # A cache of fixed size counts in a tensor: reading it would wait for the device.
        cached = cache.get_seq_length() if isinstance(cache, Cache) else 0
        if not isinstance(cached, int) or cached + length >= types.shape[1]:
            return types[:, -length:]
    raise ValueError(
        f"mm_token_type_ids has shape {tuple(types.shape)} for positions of shape {tuple(shape)}: "
        "pass one type per position."
    )


def types_to_generate(types: Tensor, total: int, step: int | None, cache: Cache | None) -> Tensor:
    """The types that ``generate`` needs for a step.

    Args:
        types: ``(B, prompt and tokens generated so far)``.
        total: Positions that ``generate`` has: those of the sequence, with the candidates of
            assisted decoding, or of new ids alone or of a chunk of a prompt.
        step: The last of them that are computed; None: all.
        cache: Of the positions before this step.
    """
    if types.shape[1] < total:  # candidates are text
        types = F.pad(types, (0, total - types.shape[1]))
    if step is not None:
        return types[:, -step:]
    if types.shape[1] > total:
        cached = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        types = types[:, cached : cached + total]
    return types
