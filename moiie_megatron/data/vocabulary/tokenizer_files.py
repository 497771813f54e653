"""Which files make a tokenizer: what ``data.tokenizer`` names, and what lies beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moiie_megatron.utils.errors import UserError

JSON_FILE: Final = "tokenizer.json"
MODEL_FILE: Final = "tokenizer.model"
CONFIG_FILE: Final = "tokenizer_config.json"
SPECIAL_TOKENS_FILE: Final = "special_tokens_map.json"
ADDED_TOKENS_FILE: Final = "added_tokens.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
_BESIDE: Final = (
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    TEMPLATE_FILE,
    "generation_config.json",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of one tokenizer.

    Attributes:
        vocabulary: A ``tokenizer.json`` or a SentencePiece model.
        beside: The other files by name: special and added tokens, chat template.
    """

    vocabulary: Path
    beside: Mapping[str, Path]

    @property
    def is_json(self) -> bool:
        """It is a ``tokenizer.json``; else a SentencePiece model."""
        return self.vocabulary.suffix == ".json"

    def copies(self) -> dict[str, Path]:
        """File names under which a copy in a directory of its own is read again, and sources."""
        name = JSON_FILE if self.is_json else MODEL_FILE
        return {name: self.vocabulary, **self.beside}


def tokenizer_files(path: str | Path) -> TokenizerFiles:
    """The files of the tokenizer that ``path`` names.

    In a directory that is ``tokenizer.json``, else ``tokenizer.model``, else the only ``.model``
    file.  The files beside it count whether the directory or the file is named.

    Raises:
        UserError: ``path`` does not exist, or is no tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        return TokenizerFiles(_vocabulary(path), _beside(path))
    if not path.is_file():
        raise UserError(f"data.tokenizer {path} does not exist: correct the path.")
    if path.suffix not in (".json", ".model"):
        raise UserError(f"data.tokenizer is {path}: use a directory, a .json or a .model file.")
    alone = path.suffix == ".json" and path.name != JSON_FILE
    return TokenizerFiles(path, {} if alone else _beside(path.parent))


def _vocabulary(directory: Path) -> Path:
    for name in (JSON_FILE, MODEL_FILE):
        if (directory / name).is_file():
            return directory / name
    models = sorted(directory.glob("*.model"))
    if len(models) != 1:
        raise UserError(
            f"data.tokenizer {directory} holds no tokenizer.json and {len(models)} .model files: "
            "use a directory with a tokenizer.json or with one SentencePiece .model."
        )
    return models[0]


def _beside(directory: Path) -> dict[str, Path]:
    return {name: directory / name for name in _BESIDE if (directory / name).is_file()}
