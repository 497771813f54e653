"""Text to token ids and back: one interface over Hugging Face and SentencePiece files."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from moiie_megatron.data.records.record import PLACEHOLDER
from moiie_megatron.data.vocabulary.fast_tokenizer import (
    load_fast_tokenizer,
    load_metadata,
    read_model,
)
from moiie_megatron.data.vocabulary.literal_markers import LiteralBackend
from moiie_megatron.data.vocabulary.sentencepiece_tokenizer import SentencePieceTokenizer
from moiie_megatron.data.vocabulary.tokenizer_files import TokenizerFiles, tokenizer_files
from moiie_megatron.utils.errors import UserError

MarkersInText = Literal["tokens", "text"]


class Tokenizer(Protocol):
    """The operations that data and generation need of a tokenizer; instances can be pickled.

    Attributes:
        bos_id: Beginning of text, if the tokenizer has one.
        eos_id: End of text.
        pad_id: Padding; the end of text if there is no padding token.
        image_id: The id at image positions.  ``vocab_size`` if the vocabulary has no image token:
            the model puts image features there and never embeds this id.
        image_token: The text that becomes ``image_id``.
        vocab_size: Number of ids, not counting an image token after all others.
        chat_template: The tokenizer's own Jinja template.
        special_tokens: Texts of ``bos_token``, ``eos_token``, ... under the names that chat
            templates use.
        markers: Matches every special token but the image token.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int
    image_id: int
    image_token: str
    vocab_size: int
    chat_template: str | None
    special_tokens: dict[str, str]
    markers: re.Pattern[str]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing added; special tokens in the text become their ids.

        An image token that is not in the vocabulary is spelled here.
        """

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the first and last + 1 character that each comes from.

        The image token becomes ``image_id``.  Tokens that share a character have the same; a token
        that is not in the text (a dummy prefix) may have none, at the place where it was put.
        """

    def quote(self, text: str) -> str:
        """What somebody wrote, as it is put into a template: markers in it may be made plain."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids; ids outside the vocabulary (image, padded embedding rows) are skipped."""

    def token_id(self, piece: str) -> int | None:
        """Id of exactly this piece, or None."""


def load_tokenizer(
    path: str | Path, image_token: str = "<image>", markers_in_text: MarkersInText = "tokens"
) -> Tokenizer:
    """The tokenizer at ``path``.

    Args:
        path: A Hugging Face directory, a ``tokenizer.json``, a SentencePiece ``.model``, or a
            directory with one ``.model``; special and added tokens and the chat template are read
            from the files beside it.
        image_token: The token at image positions; need not be in the vocabulary.
        markers_in_text: ``tokens``: special tokens in the text of a conversation become their
            ids; ``text``: they are spelled.

    Raises:
        UserError: The path does not exist, or is not a tokenizer of these kinds.
    """
    files = tokenizer_files(path)
    if files.is_json:
        return _BackendTokenizer(files, image_token, markers_in_text)
    model = read_model(files)
    if model.is_exact:
        return _BackendTokenizer(files, image_token, markers_in_text)
    if markers_in_text == "text":
        raise UserError(
            f"data.markers_in_text is text but {files.vocabulary} has no exact form in the "
            "tokenizers library: put the tokenizer.json of the model beside it, or use tokens."
        )
    return _ModelTokenizer(files, image_token)


class _Loaded(ABC):
    """What a loaded tokenizer says of itself.

    Args:
        fast: A ``PreTrainedTokenizerFast``.
    """

    def __init__(self, files: TokenizerFiles, fast: Any, image_token: str) -> None:
        if fast.eos_token_id is None:
            raise UserError(
                f"data.tokenizer {files.vocabulary} names no eos_token: set it in "
                "tokenizer_config.json."
            )
        vocabulary: dict[str, int] = fast.get_vocab()
        # An exported model's tokenizer has its image token after the model's vocabulary.
        self.vocab_size = max(i for token, i in vocabulary.items() if token != image_token) + 1
        self.bos_id: int | None = fast.bos_token_id
        self.eos_id: int = fast.eos_token_id
        self.pad_id: int = self.eos_id if fast.pad_token_id is None else fast.pad_token_id
        self.image_token = image_token
        self.image_id = vocabulary[image_token]
        template = fast.chat_template
        self.chat_template: str | None = (
            template.get("default") if isinstance(template, dict) else template
        )
        self.special_tokens = {
            name: str(token)
            for name, token in fast.special_tokens_map.items()
            if not isinstance(token, list)
        }
        self._markers = tuple(
            token.content
            for token in fast.added_tokens_decoder.values()
            if token.special and token.content not in (image_token, PLACEHOLDER)
        )
        self.markers = re.compile("|".join(map(re.escape, self._markers)) or "(?!)")

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See ``Tokenizer``."""

    def encode(self, text: str) -> list[int]:
        return self.encode_with_offsets(text)[0]

    def quote(self, text: str) -> str:
        return text


class _BackendTokenizer(_Loaded):
    """By the ``tokenizers`` library."""

    def __init__(
        self, files: TokenizerFiles, image_token: str, markers_in_text: MarkersInText
    ) -> None:
        fast = load_fast_tokenizer(files, image_token)
        super().__init__(files, fast, image_token)
        self._backend: Any = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._literal: LiteralBackend | None = None
        # Nothing is added to a text; some would move the offsets of tokens behind their spaces.
        self._backend.post_processor = None
        if self.encode_with_offsets(image_token * 2)[0][-2:] != [self.image_id] * 2:
            raise UserError(
                f"data.tokenizer {files.vocabulary} does not find its own image token "
                f"{image_token} in a text: name another data.image_token."
            )
        if markers_in_text == "text":
            self._literal = LiteralBackend(self._backend, self._markers, image_token)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if self._literal is not None:
            return self._literal.encode(text)
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode(self, text: str) -> list[int]:
        backend = self._backend
        if self.image_id >= self.vocab_size and self.image_token in text:
            backend = self._without_image_token()
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    def _without_image_token(self) -> Any:
        values = json.loads(self._backend.to_str())
        values["added_tokens"] = [
            token for token in values["added_tokens"] if token["content"] != self.image_token
        ]
        return type(self._backend).from_str(json.dumps(values))

    def quote(self, text: str) -> str:
        return text if self._literal is None else self._literal.quote(text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return str(self._backend.decode(known, skip_special_tokens=skip_special_tokens))

    def token_id(self, piece: str) -> int | None:
        found: int | None = self._backend.token_to_id(piece)
        return None if found is None or found >= self.vocab_size else found


class _ModelTokenizer(_Loaded):
    """By sentencepiece."""

    def __init__(self, files: TokenizerFiles, image_token: str) -> None:
        model = read_model(files)
        model.ensure_marker(image_token)
        super().__init__(files, load_metadata(files, model), image_token)
        self._model = SentencePieceTokenizer(model)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self._model.encode_with_offsets(text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return self._model.decode(known, skip_special_tokens)

    def token_id(self, piece: str) -> int | None:
        found = self._model.token_id(piece)
        return None if found is None or found >= self.vocab_size else found
