"""SentencePiece models with added tokens, and their exact form in the ``tokenizers`` library.

transformers 5.23 has a conversion of its own, whose ids differ wherever several spaces follow each
other: it orders merges by id, not by score, and leaves out the dummy prefix before a space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from moiie_megatron.utils.errors import UserError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # piece types of sentencepiece_model.proto
_BPE: Final = 2  # model type
_SPACE: Final = "\u2581"
# Stand-ins for markers (literal_markers.py) are tokens as well.
_STAND_INS: Final = r"[\x{F0000}-\x{FFFFD}]"


@dataclass(frozen=True)
class Marker:
    """A token that is found in a text as a whole.

    Attributes:
        special: Left out of decoded answers.
        lstrip: Takes the white space in front of it.
        rstrip: Takes the white space behind it.
        added: From a file of added tokens.
    """

    id: int
    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    added: bool = False


class SentencePieceModel:
    """A SentencePiece model and its markers.

    Markers are its control pieces (``<s>``), which sentencepiece itself would spell out letter by
    letter in a text, its user-defined pieces, and the added tokens.

    Args:
        content: Of the file.
        name: For messages.
        added: In the order of their ids; new ones follow the model's pieces without a gap.

    Attributes:
        markers: In the order of their ids.
        special_tokens: ``bos_token``, ``eos_token`` and ``pad_token``, as far as the model has
            control pieces for them.

    Raises:
        UserError: Not a SentencePiece model, or added tokens that do not fit it.
    """

    def __init__(self, content: bytes, name: str, added: Sequence[Marker] = ()) -> None:
        self.proto: Any = _parse(content, name)
        for marker in added:
            self._add(marker, name)
        found = {marker.id: marker for marker in added}
        for i, piece in enumerate(self.proto.pieces):
            if i not in found and piece.type in (_CONTROL, _USER_DEFINED):
                bracketed = re.fullmatch(r"<[^<>\s]+>", piece.piece) is not None
                found[i] = Marker(i, piece.piece, piece.type == _CONTROL or bracketed)
        self.markers = tuple(found[i] for i in sorted(found))
        control = {p.piece for p in self.proto.pieces if p.type == _CONTROL}
        spec = self.proto.trainer_spec
        named = {
            "bos_token": spec.bos_piece,
            "eos_token": spec.eos_piece,
            "pad_token": spec.pad_piece,
        }
        self.special_tokens = {key: text for key, text in named.items() if text in control}

    def _add(self, marker: Marker, name: str) -> None:
        pieces = self.proto.pieces
        if marker.id > len(pieces):
            raise UserError(
                f"data.tokenizer {name}: the added token {marker.text} has id {marker.id} but the "
                f"ids before it end at {len(pieces) - 1}: use the tokenizer.json of the model."
            )
        if marker.id == len(pieces):
            pieces.add(piece=marker.text, score=0.0, type=_USER_DEFINED)
            return
        piece = pieces[marker.id]
        if piece.piece != marker.text:
            if piece.type not in (_CONTROL, _USER_DEFINED, _UNUSED):
                raise UserError(
                    f"data.tokenizer {name}: the added token {marker.text} has id {marker.id}, "
                    f"which is the model's piece {piece.piece}: use the tokenizer.json of the "
                    "model."
                )
            piece.piece, piece.type = marker.text, _USER_DEFINED
        elif piece.type not in (_CONTROL, _USER_DEFINED):
            piece.type = _USER_DEFINED

    def ensure_marker(self, text: str) -> None:
        """Make a text a marker, behind all pieces if it is none of them."""
        if all(marker.text != text for marker in self.markers):
            ids = {piece.piece: i for i, piece in enumerate(self.proto.pieces)}
            marker = Marker(ids.get(text, len(ids)), text, special=True, added=True)
            self._add(marker, "")
            self.markers = (*self.markers, marker)

    def serialized(self) -> bytes:
        """The model for sentencepiece, which then finds every marker in a text.

        Raises:
            UserError: A marker takes the white space around it, which sentencepiece cannot do.
        """
        strips = [m.text for m in self.markers if m.lstrip or m.rstrip or m.single_word]
        if strips:
            raise UserError(
                f"data.tokenizer: the added token {strips[0]} takes the white space around it, "
                "which this kind of SentencePiece model cannot have: use the tokenizer.json of "
                "the model."
            )
        proto = type(self.proto)()
        proto.CopyFrom(self.proto)
        for marker in self.markers:
            proto.pieces[marker.id].type = _USER_DEFINED
        content: bytes = proto.SerializeToString()
        return content

    @property
    def is_exact(self) -> bool:
        """Whether ``backend`` gives the ids of sentencepiece.

        That is so for models as those of Llama 2, Mistral and Phi-3: BPE without normalization.
        Of pieces with equal scores sentencepiece merges the leftmost one, the library always the
        same one.  Llama's pieces of spaces alone have equal scores; there both are the same.
        """
        proto, spec = self.proto, self.proto.normalizer_spec
        merged = [p for p in proto.pieces if p.type == _NORMAL and len(p.piece) > 1]
        scores = [p.score for p in merged if p.piece.strip(_SPACE)]
        return (
            proto.trainer_spec.model_type == _BPE
            and not proto.trainer_spec.treat_whitespace_as_suffix
            and spec.escape_whitespaces
            and not spec.remove_extra_whitespaces
            and not spec.precompiled_charsmap
            and not proto.denormalizer_spec.precompiled_charsmap
            and len(set(scores)) == len(scores)
            and all(p.type != _UNUSED for p in proto.pieces)
        )

    def backend(self, bos_token: str | None) -> Any:
        """The model as a ``tokenizers.Tokenizer``.

        Markers are found in a text and the rest is encoded as by sentencepiece.  The dummy prefix
        stands at the beginning of a text, or behind a BOS there; not in front of an added token.

        Args:
            bos_token: The text of BOS.
        """
        # Imported here: seconds, and not needed in worker processes.
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
        from tokenizers import pre_tokenizers as splits
        from transformers.convert_slow_tokenizer import generate_merges

        pieces, spec = self.proto.pieces, self.proto.trainer_spec
        vocabulary = {p.piece: i for i, p in enumerate(pieces)}
        whole = {p.piece for p in pieces if p.type != _NORMAL}
        scores = {p.piece: p.score for p in pieces if p.type == _NORMAL}
        merges = generate_merges(vocabulary, scores, whole)
        backend = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=merges,
                unk_token=spec.unk_piece,
                fuse_unk=True,
                byte_fallback=spec.byte_fallback,
            )
        )
        has_prefix = self.proto.normalizer_spec.add_dummy_prefix
        if has_prefix:
            backend.normalizer = normalizers.Replace(Regex(self._prefix_place()), _SPACE)
        backend.pre_tokenizer = splits.Metaspace(_SPACE, prepend_scheme="never", split=False)
        steps: list[Any] = [
            decoders.Replace(spec.unk_piece, spec.unk_surface),
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
        backend.decoder = decoders.Sequence(
            [*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps
        )
        backend.add_tokens(
            [
                AddedToken(
                    marker.text,
                    special=marker.special,
                    # What follows a token that is found before normalization is normalized as a
                    # text of its own, with a prefix.
                    normalized=marker.text != bos_token,
                    lstrip=marker.lstrip,
                    rstrip=marker.rstrip,
                    single_word=marker.single_word,
                )
                for marker in self.markers
            ]
        )
        return backend

    def _prefix_place(self) -> str:
        """Matches the empty string where the dummy prefix stands.

        Texts that are nothing but a marker are left alone: the library normalizes every marker by
        itself to find it in a normalized text.
        """
        own = [re.escape(m.text) for m in self.markers if not m.added]
        added = [re.escape(m.text) for m in self.markers if m.added]
        left_alone = [*added, f"(?:{'|'.join([*own, _STAND_INS])})\\z"]
        return rf"\A(?!{'|'.join(left_alone)})"


def _parse(content: bytes, name: str) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()  # generated, untyped
    try:
        proto.ParseFromString(content)
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
    return proto
