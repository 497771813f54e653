"""Which tokens end an answer, in generation and in an export."""

from __future__ import annotations

import json
from pathlib import Path

from moiie_megatron.data.encode.segments import Template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import Turn

GENERATION_FILE = "generation_config.json"


def stop_ids(
    tokenizer: Tokenizer, template: Template, source: str | Path | None = None
) -> frozenset[int]:
    """Ids that end an answer: the end of text, what the template teaches, what the source says.

    Args:
        tokenizer: Its end of text always counts.
        template: The token that ends its assistant turns is learned.
        source: Directory of a model or checkpoint; the ``eos_token_id`` of its
            ``generation_config.json`` counts, too.
    """
    learned = learned_end(tokenizer, template)
    stated = [] if source is None else _stated(Path(source), tokenizer.vocab_size)
    return frozenset([tokenizer.eos_id, *([] if learned is None else [learned]), *stated])


def learned_end(tokenizer: Tokenizer, template: Template) -> int | None:
    """The token at the end of an answer, if the template writes more than the text there."""
    sample = "a"
    segments = template.render([Turn("user", sample), Turn("assistant", sample)])
    *_, answer = (segment.text for segment in segments if segment.train)
    last = tokenizer.encode(answer)[-1]
    # A space is no end: it stands between the words of an answer, too.
    is_end = last not in tokenizer.encode(sample) and answer.rstrip(" ") == answer
    return last if is_end else None


def _stated(source: Path, vocab_size: int) -> list[int]:
    """The ids in the vocabulary that the source stops at; a file that cannot be read has none."""
    try:
        content = json.loads((source / GENERATION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    value = content.get("eos_token_id") if isinstance(content, dict) else None
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if type(i) is int and 0 <= i < vocab_size]
