"""Conversations to text, in segments that are trainable or context.

The tokens of a trainable segment are targets; those of a context segment are only read.  An
assistant turn is trainable together with the token that ends it; the header before it is context.
"""

from __future__ import annotations

from moiie_megatron.config.families import template_names
from moiie_megatron.config.messages import listed
from moiie_megatron.data.encode.marker_templates import MarkerTemplate, PlainTemplate
from moiie_megatron.data.encode.segments import Segment, Template
from moiie_megatron.data.encode.tokenizer_template import TokenizerTemplate
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.record import PLACEHOLDER
from moiie_megatron.families.registry import chat_formats
from moiie_megatron.utils.errors import UserError

__all__ = ["Segment", "Template", "load_template"]


def load_template(name: str, tokenizer: Tokenizer, image_token: str = PLACEHOLDER) -> Template:
    """The chat format called ``name`` (``stage.template``).

    Args:
        name: Value of ``stage.template``.
        tokenizer: Gives the markers, and for ``tokenizer`` the chat template.
        image_token: ``data.image_token``, for the text of an exported chat template; segments
            have ``<image>``.

    Raises:
        UserError: Unknown name, or the tokenizer lacks what the format needs.
    """
    if name == "plain":
        return PlainTemplate(tokenizer, image_token)
    if name == "tokenizer":
        return TokenizerTemplate(tokenizer, image_token)
    formats = chat_formats()
    if name in formats:
        return MarkerTemplate(tokenizer, formats[name], image_token)
    raise UserError(f"stage.template is {name}: use {listed(template_names())}.")
