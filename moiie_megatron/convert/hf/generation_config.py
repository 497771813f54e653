"""``generation_config.json`` of an export: the source's, as far as transformers accepts it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

from moiie_megatron.data.encode.stop_ids import GENERATION_FILE

# Values that decide whether others are accepted; they are tried before those.
_SWITCHES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")
_IDS = ("suppress_tokens", "begin_suppress_tokens")


def generation_config(
    source: Path, ids: Mapping[str, int | list[int] | None], vocab_size: int
) -> tuple[dict[str, Any], list[str]]:
    """What to write, and sentences about what had to be left out.

    A value that transformers' strict validation refuses is left out: the export could not be saved
    again with it.  So are token ids outside the vocabulary.

    Args:
        source: Directory that may hold a ``generation_config.json``.
        ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.  ``eos_token_id`` replaces
            the source's, the others are for a source without them.
        vocab_size: Number of ids.
    """
    file = source / GENERATION_FILE
    stated, notes = _read(file)
    kept: dict[str, Any] = {}
    for key in sorted(stated, key=lambda key: key not in _SWITCHES):
        value = stated[key]
        if value is None:
            continue
        if _is_outside(key, value, vocab_size):
            notes.append(
                f"{file}: {key} {value} is left out, as far as it is outside the "
                f"vocabulary of {vocab_size} ids."
            )
        elif not _is_valid(kept | {key: value}):
            notes.append(f"{file}: {key} {value} is left out, transformers would refuse it.")
        elif key != "eos_token_id":
            kept[key] = value
    defaults = {key: value for key, value in ids.items() if value is not None}
    return {**defaults, **kept, "eos_token_id": ids["eos_token_id"]}, notes


def _read(file: Path) -> tuple[dict[str, Any], list[str]]:
    if not file.is_file():
        return {}, []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{file} cannot be read ({error}): the export has default values instead."]
    if not isinstance(content, dict):
        return {}, [f"{file} is no JSON object: the export has default values instead."]
    return content, []


def _is_outside(key: str, value: object, vocab_size: int) -> bool:
    if not (key.endswith("_token_id") or key in _IDS):
        return False
    values = value if isinstance(value, list) else [value]
    return not all(type(i) is int and 0 <= i < vocab_size for i in values)


def _is_valid(values: dict[str, Any]) -> bool:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the constructor warns of what is asked here
    try:
        GenerationConfig(**values).validate(strict=True)
    except Exception:  # of any type, depending on the value
        return False
    finally:
        logging.set_verbosity(verbosity)
    return True
