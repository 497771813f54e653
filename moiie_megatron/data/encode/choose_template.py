"""Which chat format a model gets that comes with a tokenizer alone."""

from __future__ import annotations

from moiie_megatron.data.encode.chat_jinja import name_in
from moiie_megatron.data.encode.marker_templates import missing_markers
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizer_template import UnusableTemplate
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.families.registry import chat_formats
from moiie_megatron.utils.errors import UserError


def choose_template(tokenizer: Tokenizer, default: str) -> tuple[str, str | None]:
    """``stage.template`` for a tokenizer, and a sentence where that is not what one would expect.

    The tokenizer's own template if it serves, else a built-in format whose markers the tokenizer
    has.  The template of an export names the format that it was made from.

    Args:
        default: Where the tokenizer has no chat template; plain if it lacks the markers.

    Raises:
        UserError: The tokenizer's template does not serve, and no built-in format fits.
    """
    formats = chat_formats()
    if tokenizer.chat_template is None:
        fits = default not in formats or not missing_markers(tokenizer, formats[default])
        return default if fits else "plain", None
    name = name_in(tokenizer.chat_template)
    if name in (*formats, "plain"):
        return str(name), None
    try:
        load_template("tokenizer", tokenizer)
    except UnusableTemplate as error:
        for chat in formats.values():
            if not missing_markers(tokenizer, chat):
                return chat.name, (
                    f"{error.reason}, so stage.template is {chat.name}, whose markers the "
                    "tokenizer has."
                )
        raise UserError(
            f"{error.reason}, and the tokenizer has the markers of no built-in format: remove "
            "chat_template.jinja (or chat_template in tokenizer_config.json), which gives plain."
        ) from error
    return "tokenizer", None
