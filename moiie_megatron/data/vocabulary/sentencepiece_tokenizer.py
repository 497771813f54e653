"""Ids by sentencepiece itself, for models that the ``tokenizers`` library cannot have exactly."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from moiie_megatron.data.vocabulary.sentencepiece_model import SentencePieceModel


class SentencePieceTokenizer:
    """Text to ids and back (``tokenizers.Tokenizer``) by a SentencePiece model.

    Every marker of the model is one token wherever it stands in a text.

    Raises:
        UserError: The model has a marker that takes the white space around it.
    """

    def __init__(self, model: SentencePieceModel) -> None:
        self._hidden = frozenset(marker.id for marker in model.markers if marker.special)
        self._load(model.serialized())

    def _load(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._processor: Any = SentencePieceProcessor(model_proto=model)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_processor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load(state["_model"])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters that each comes from."""
        from sentencepiece import sentencepiece_pb2

        encoded: Any = vars(sentencepiece_pb2)["SentencePieceText"]()  # generated, untyped
        encoded.ParseFromString(self._processor.encode(text, out_type="serialized_proto"))
        lengths = accumulate((len(character.encode()) for character in text), initial=0)
        character_at = {length: i for i, length in enumerate(lengths)}  # by bytes in front of it
        ids = [piece.id for piece in encoded.pieces]
        return ids, [(character_at[p.begin], character_at[p.end]) for p in encoded.pieces]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        """Text of ids."""
        hidden = self._hidden if skip_special_tokens else frozenset()
        return str(self._processor.decode([i for i in ids if i not in hidden]))

    def token_id(self, piece: str) -> int | None:
        """Id of exactly this piece, or None."""
        i: int = self._processor.piece_to_id(piece)
        return i if self._processor.id_to_piece(i) == piece else None
