"""One way to load a tokenizer for training, generation and the processor of an export."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from moiie_megatron.data.vocabulary.sentencepiece_model import Marker, SentencePieceModel
from moiie_megatron.data.vocabulary.tokenizer_files import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    JSON_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TokenizerFiles,
)
from moiie_megatron.utils.errors import UserError

# What of tokenizer_config.json a SentencePiece model still needs in the ``tokenizers`` library.
_CONFIG_KEYS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "additional_special_tokens",
    "extra_special_tokens",
    "chat_template",
    "model_max_length",
)


def load_fast_tokenizer(files: TokenizerFiles, image_token: str) -> Any:
    """The tokenizer as a ``PreTrainedTokenizerFast``, which knows the image token.

    A ``tokenizer.json`` is taken as it is; transformers' classes for single families would rebuild
    parts of it.  A SentencePiece model without an exact form (``SentencePieceModel.is_exact``) is
    left to transformers: its ids must be compared with those of training.  An image token that is
    not in the vocabulary gets the id behind all others.

    Raises:
        UserError: Broken files.
    """
    model = None if files.is_json else read_model(files)
    if model is not None and model.is_exact:
        fast = _with_backend(files, model, None)
    else:
        fast = _from_directory(files)
    if image_token not in fast.get_added_vocab():
        from tokenizers import AddedToken

        fast.add_tokens([AddedToken(image_token, special=True, normalized=False)])
    return fast


def read_model(files: TokenizerFiles) -> SentencePieceModel:
    """The SentencePiece model with the added tokens that lie beside it, as transformers reads them.

    Raises:
        UserError: Broken files.
    """
    content = files.vocabulary.read_bytes()
    return SentencePieceModel(content, str(files.vocabulary), _added_tokens(files))


def load_metadata(files: TokenizerFiles, model: SentencePieceModel) -> Any:
    """Special tokens and chat template of a model without an exact form.

    Returns:
        A ``PreTrainedTokenizerFast`` that knows every piece as one word: ids of single tokens are
        right, those of texts are not.
    """
    from tokenizers import Tokenizer, models

    pieces = {piece.piece: i for i, piece in enumerate(model.proto.pieces)}
    unknown = model.proto.trainer_spec.unk_piece
    return _with_backend(files, model, Tokenizer(models.WordLevel(pieces, unk_token=unknown)))


def _from_directory(files: TokenizerFiles) -> Any:
    # Imported here: transformers takes seconds and is not needed in worker processes.
    from transformers import PreTrainedTokenizerFast

    loader: Any = PreTrainedTokenizerFast  # untyped
    path = files.vocabulary
    try:
        if not files.is_json or (path.name == JSON_FILE and files.beside):
            return loader.from_pretrained(str(path.parent), local_files_only=True)
        return loader(tokenizer_file=str(path))
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise UserError(
            f"data.tokenizer {path} cannot be loaded ({error}): use the backbone's tokenizer."
        ) from error


def _with_backend(files: TokenizerFiles, model: SentencePieceModel, backend: Any) -> Any:
    """A directory as if the model came with a tokenizer.json, loaded by transformers."""
    config = _json(files, CONFIG_FILE)
    values = model.special_tokens | {
        key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None
    }
    legacy = "added_tokens_decoder" not in config  # then transformers reads the map as well
    special_tokens = _json(files, SPECIAL_TOKENS_FILE) if legacy else {}
    if backend is None:
        bos = special_tokens.get("bos_token", values.get("bos_token"))
        backend = model.backend(_content(bos))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        backend.save(str(directory / JSON_FILE))
        (directory / CONFIG_FILE).write_text(json.dumps(values))
        if special_tokens:
            (directory / SPECIAL_TOKENS_FILE).write_text(json.dumps(special_tokens))
        if TEMPLATE_FILE in files.beside:
            shutil.copy(files.beside[TEMPLATE_FILE], directory / TEMPLATE_FILE)
        whole = TokenizerFiles(directory / JSON_FILE, {CONFIG_FILE: directory / CONFIG_FILE})
        fast = _from_directory(whole)
    fast.name_or_path = fast.init_kwargs["name_or_path"] = str(files.vocabulary)
    return fast


def _added_tokens(files: TokenizerFiles) -> list[Marker]:
    """In the order of their ids."""
    config = _json(files, CONFIG_FILE)
    special = {_content(value) for key, value in config.items() if key.endswith("_token")}
    special |= {_content(value) for value in _json(files, SPECIAL_TOKENS_FILE).values()}
    found: dict[int, dict[str, Any]] = {}
    where = CONFIG_FILE
    try:
        if "added_tokens_decoder" in config:
            for i, value in config["added_tokens_decoder"].items():
                found[int(i)] = value if isinstance(value, dict) else {"content": value}
        else:
            where = ADDED_TOKENS_FILE
            for text, i in _json(files, ADDED_TOKENS_FILE).items():
                found[int(i)] = {"content": text}
        markers = [
            Marker(
                i,
                str(value["content"]),
                bool(value.get("special")) or value["content"] in special or _is_bracketed(value),
                lstrip=bool(value.get("lstrip")),
                rstrip=bool(value.get("rstrip")),
                single_word=bool(value.get("single_word")),
                added=True,
            )
            for i, value in found.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{files.beside[where]} has added tokens of another form ({error}): use the file that "
            "came with the model."
        ) from error
    return sorted(markers, key=lambda marker: marker.id)


def _is_bracketed(value: dict[str, Any]) -> bool:
    """``<|end|>`` in an added_tokens.json, which does not say what is special."""
    text = value["content"]
    return "special" not in value and text.startswith("<") and text.endswith(">")


def _content(value: Any) -> str | None:
    """The text of a special token, which is a string or an added token."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _json(files: TokenizerFiles, name: str) -> dict[str, Any]:
    if name not in files.beside:
        return {}
    path = files.beside[name]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore the file.") from error
    return value
