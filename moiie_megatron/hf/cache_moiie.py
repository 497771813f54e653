"""The key-value cache under the name that the installed transformers gives it.

Up to 5.23 functions of transformers call it ``past_key_values``, from 5.24 on ``cache``.  Most of
them take any keyword, so that a cache under a wrong name is ignored instead of refused: here this
is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from .version_moiie import TESTED_VERSIONS

NAMES = ("cache", "past_key_values")


def _refusal(what: str) -> str:
    return (
        f"{what}: transformers {transformers.__version__} handles the cache in another way than "
        f"this model; use {TESTED_VERSIONS}, or use_cache=False."
    )


def name_in(function: Callable[..., Any]) -> str:
    """What a function calls its cache.

    Raises:
        RuntimeError: It has no argument of a known name.
    """
    parameters = inspect.signature(function).parameters
    for name in NAMES:
        if name in parameters:
            return name
    raise RuntimeError(_refusal(f"{function.__qualname__} has no argument {' or '.join(NAMES)}"))


# Layers, masks and outputs get the cache under the name that generate has for it.
CACHE = name_in(GenerationMixin.prepare_inputs_for_generation)


def check_takes_cache(function: Callable[..., Any]) -> None:
    """Raise ``RuntimeError`` if a function would ignore a cache that is passed as ``CACHE``."""
    if name_in(function) != CACHE:
        raise RuntimeError(_refusal(f"{function.__qualname__} has no argument {CACHE}"))


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """What was passed under one of the two names; ``ValueError`` if there is something in both."""
    if past_key_values is not None and cache is not None:
        raise ValueError(f"There are two caches, past_key_values and cache: pass one, as {CACHE}.")
    return past_key_values if cache is None else cache


def take_cache(past_key_values: Cache | None, kwargs: dict[str, Any]) -> Cache | None:
    """The cache of a call, which may also be in ``kwargs``, from where it is removed.

    In 5.23 ``cache`` in ``kwargs`` may be that of ``generate_batch``, which is not a ``Cache``: it
    is meant for the attention alone and stays.

    Raises:
        ValueError: Two caches.
        RuntimeError: A cache under an unknown name.
    """
    if CACHE == "cache" or isinstance(kwargs.get("cache"), Cache):
        past_key_values = one_cache(past_key_values, kwargs.pop("cache", None))
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise RuntimeError(_refusal(f"A cache was passed as {name}"))
    return past_key_values


def check_covers(cache: Cache | None, length: int, total: int) -> None:
    """Check that no position is missing from a step.

    Args:
        cache: Of the positions before this step.
        length: Positions of this step.
        total: Positions of the sequence so far, of this step included.

    Raises:
        RuntimeError: Step and cache together have fewer positions than the sequence: the cache
            has been lost, or has not been written to, on the way here.
    """
    # A cache of fixed size counts in a tensor: reading it would wait for the device.
    cached = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if isinstance(cached, int) and cached + length < total:
        raise RuntimeError(
            _refusal(f"Of {total} positions {length} were passed and {cached} are in the cache")
        )
