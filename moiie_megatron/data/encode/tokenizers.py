"""Text to token ids and back: one interface over Hugging Face and SentencePiece files.

SentencePiece models are read by sentencepiece itself: transformers 5.23 rebuilds them as a
``tokenizers`` BPE whose ids differ wherever several spaces follow each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from moiie_megatron.utils.errors import UserError

_CONTROL = 3  # piece types of sentencepiece_model.proto
_USER_DEFINED = 4


class Tokenizer(Protocol):
    """The operations that data and generation need of a tokenizer; instances can be pickled.

    Attributes:
        bos_id: Beginning of text, if the tokenizer has one.
        eos_id: End of text.
        pad_id: Padding; the end of text if there is no padding token.
        image_id: The id at image positions.  ``vocab_size`` if the vocabulary has no image token:
            the model puts image features there and never embeds this id.
        vocab_size: Number of ids, not counting an image token after all others.
        chat_template: The tokenizer's own Jinja template.
        special_tokens: Texts of ``bos_token``, ``eos_token``, ... under the names that chat
            templates use.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int
    image_id: int
    vocab_size: int
    chat_template: str | None
    special_tokens: dict[str, str]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing added; special tokens in the text become their ids."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids; ids outside the vocabulary (image, padded embedding rows) are skipped."""

    def token_id(self, piece: str) -> int | None:
        """Id of exactly this piece, or None."""


def load_tokenizer(path: str | Path, image_token: str = "<image>") -> Tokenizer:
    """The tokenizer at ``path``.

    Args:
        path: A Hugging Face directory, a ``tokenizer.json``, a SentencePiece ``.model``, or a
            directory whose only tokenizer is one ``.model``.
        image_token: The token at image positions; need not be in the vocabulary.

    Raises:
        UserError: The path does not exist, or is not a tokenizer of these kinds.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return HuggingFaceTokenizer(path, image_token)
        models = sorted(path.glob("*.model"))
        if len(models) == 1:
            return SentencePieceTokenizer(models[0].read_bytes(), str(models[0]), image_token)
        raise UserError(
            f"data.tokenizer {path} holds no tokenizer.json and {len(models)} .model files: use a "
            "directory with a tokenizer.json or with one SentencePiece .model."
        )
    if not path.is_file():
        raise UserError(f"data.tokenizer {path} does not exist: correct the path.")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, image_token)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), str(path), image_token)
    raise UserError(f"data.tokenizer is {path}: use a directory, a .json or a .model file.")


class HuggingFaceTokenizer:
    """A ``tokenizer.json``; special tokens and chat template from the files beside it."""

    def __init__(self, path: Path, image_token: str) -> None:
        # Imported here: transformers takes seconds and is not needed in worker processes.
        from transformers import PreTrainedTokenizerFast

        loader: Any = PreTrainedTokenizerFast  # untyped

        try:
            if path.is_dir():
                fast = loader.from_pretrained(str(path), local_files_only=True)
            elif path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").exists():
                fast = loader.from_pretrained(str(path.parent), local_files_only=True)
            else:
                fast = loader(tokenizer_file=str(path))
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise UserError(
                f"data.tokenizer {path} cannot be loaded ({error}): use the backbone's tokenizer."
            ) from error
        self._backend: Any = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        # An exported model's tokenizer has its image token after the model's vocabulary.
        self.vocab_size = max(i for token, i in vocabulary.items() if token != image_token) + 1
        if fast.eos_token_id is None:
            raise UserError(
                f"data.tokenizer {path} names no eos_token: set it in tokenizer_config.json."
            )
        self.bos_id: int | None = fast.bos_token_id
        self.eos_id: int = fast.eos_token_id
        self.pad_id: int = self.eos_id if fast.pad_token_id is None else fast.pad_token_id
        image_id = self.token_id(image_token)
        self.image_id = self.vocab_size if image_id is None else image_id
        template = fast.chat_template
        self.chat_template: str | None = (
            template.get("default") if isinstance(template, dict) else template
        )
        self.special_tokens = {
            name: str(token)
            for name, token in fast.special_tokens_map.items()
            if not isinstance(token, list)
        }

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return str(self._backend.decode(known, skip_special_tokens=skip_special_tokens))

    def token_id(self, piece: str) -> int | None:
        found: int | None = self._backend.token_to_id(piece)
        return found


class SentencePieceTokenizer:
    """A SentencePiece model.

    Control pieces (``<s>``, chat markers) are turned into user-defined ones, which is the only
    change to the model: otherwise sentencepiece would spell them out letter by letter in a text.
    """

    chat_template: str | None = None

    def __init__(self, model: bytes, name: str, image_token: str) -> None:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()  # generated, untyped
        try:
            proto.ParseFromString(model)
        except DecodeError as error:
            raise UserError(
                f"data.tokenizer {name} is not a SentencePiece model: a tiktoken file (Llama-3's "
                "tokenizer.model) must be converted to a tokenizer.json first."
            ) from error
        if not proto.pieces:
            raise UserError(
                f"data.tokenizer {name} is not a SentencePiece model, it has no pieces: use the "
                "backbone's tokenizer."
            )
        spec = proto.trainer_spec
        control = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == _CONTROL}
        markers = {
            i
            for i, p in enumerate(proto.pieces)
            if p.type == _USER_DEFINED and re.fullmatch(r"<[^<>\s]+>", p.piece)
        }
        self._hidden = frozenset(markers | set(control.values()))  # by skip_special_tokens
        for piece in proto.pieces:
            if piece.type == _CONTROL:
                piece.type = _USER_DEFINED
        self._load(proto.SerializeToString())
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id = control.get(spec.bos_piece)
        if spec.eos_piece not in control:
            raise UserError(
                f"data.tokenizer {name} has no end-of-text piece {spec.eos_piece}: use the "
                "backbone's tokenizer."
            )
        self.eos_id = control[spec.eos_piece]
        self.pad_id = control.get(spec.pad_piece, self.eos_id)
        image_id = self.token_id(image_token)
        self.image_id = self.vocab_size if image_id is None else image_id
        self.special_tokens = {"eos_token": spec.eos_piece, "unk_token": spec.unk_piece}
        if self.bos_id is not None:
            self.special_tokens["bos_token"] = spec.bos_piece

    def _load(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._processor: Any = SentencePieceProcessor(model_proto=model)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_processor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load(state["_model"])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        hidden = self._hidden if skip_special_tokens else frozenset()
        known = [i for i in ids if 0 <= i < self.vocab_size and i not in hidden]
        return str(self._processor.decode(known))

    def token_id(self, piece: str) -> int | None:
        i: int = self._processor.piece_to_id(piece)
        return i if self._processor.id_to_piece(i) == piece else None
