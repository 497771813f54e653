"""Special tokens in the text of a conversation as plain text, beside the template's own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.utils.errors import UserError

# Characters for private use, which no text has: stand for a template's markers, which become
# tokens, and for the same texts in a conversation, which are spelled.
_TOKENS: Final = 0xF0000
_QUOTED: Final = 0x100000
_RESERVED: Final = re.compile("[\U000f0000-\U0010ffff]")


class LiteralBackend:
    """A tokenizer that finds markers where a template wrote them, and not in quoted text.

    Args:
        backend: A ``tokenizers.Tokenizer`` without post-processor.
        markers: Texts of the special tokens.
        image_token: A marker as well.

    Raises:
        UserError: The tokenizer cannot spell one of them.
    """

    def __init__(self, backend: Any, markers: Sequence[str], image_token: str) -> None:
        from tokenizers import AddedToken, Tokenizer

        self._markers = [*markers, image_token]
        stands_for = {marker: chr(_TOKENS + i) for i, marker in enumerate(self._markers)}
        values = json.loads(backend.to_str())
        added, values["added_tokens"] = values["added_tokens"], []
        _rename(values["normalizer"], stands_for)
        literal: Any = Tokenizer.from_str(json.dumps(values))
        self._ids: dict[int, int] = {}
        for token in added:
            flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized")}
            content = stands_for.get(token["content"], token["content"])
            literal.add_tokens([AddedToken(content, special=False, **flags)])
            self._ids[literal.token_to_id(content)] = token["id"]
        self._backend = literal
        self._found = re.compile("|".join(map(re.escape, self._markers)))
        self._quoted = {marker: chr(_QUOTED + i) for i, marker in enumerate(self._markers)}
        self._written = re.compile(f"{self._found.pattern}|[{chr(_QUOTED)}-\U0010ffff]")
        self._stands_for = stands_for
        unknown = self.encode(chr(_TOKENS - 1))[0]
        for marker in self._markers:
            token_id = backend.token_to_id(marker)
            spelled = self.encode(self.quote(marker))[0]
            if token_id not in self.encode(marker)[0] or token_id in set(spelled) - set(unknown):
                raise UserError(
                    f"data.markers_in_text is text but the tokenizer cannot spell {marker}: use "
                    "tokens."
                )

    def quote(self, text: str) -> str:
        """``text`` with its markers made plain.

        Raises:
            BadRecord: It has a character that is reserved for this.
        """
        reserved = _RESERVED.search(text)
        if reserved:
            raise BadRecord(
                f"the text has the character U+{ord(reserved[0]):X} for private use, which "
                "data.markers_in_text=text needs"
            )
        return self._found.sub(lambda match: self._quoted[match[0]], text)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of a text in which only quoted markers are plain."""
        parts: list[str] = []
        origin: list[int] = []  # of every character that is encoded
        done = 0
        for match in self._written.finditer(text):
            part = match[0]
            new = self._stands_for.get(part) or self._markers[ord(part) - _QUOTED]
            parts += [text[done : match.start()], new]
            origin.extend(range(done, match.start()))
            origin.extend([match.start()] * len(new))
            done = match.end()
        parts.append(text[done:])
        origin.extend(range(done, len(text) + 1))
        encoding = self._backend.encode("".join(parts), add_special_tokens=False)
        ids = [self._ids.get(i, i) for i in encoding.ids]
        return ids, [(origin[start], origin[end]) for start, end in encoding.offsets]


def _rename(normalizer: dict[str, Any] | None, stands_for: Mapping[str, str]) -> None:
    """Put the stand-ins into a pattern that names markers (``sentencepiece_model.py``)."""
    pattern = (normalizer or {}).get("pattern", {})
    for marker in sorted(stands_for, key=len, reverse=True):
        if "Regex" in pattern:
            pattern["Regex"] = pattern["Regex"].replace(re.escape(marker), stands_for[marker])
