"""The text of the chat templates that exports carry.

Every one begins with the same statements, so that it writes the same text wherever and whenever it
is used: the content of a message may be a string or a list of parts, the date is fixed, reasoning
is switched off, the BOS token is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from moiie_megatron.families.family import ChatFormat

# Llama 3's templates write this day where there is no clock.
FIXED_DATE: Final = datetime(2024, 7, 26, tzinfo=UTC)
_DATE_CODES: Final = "aAbBcdDeFhHIjmMpSTuUVwWxXyY"

_NAME: Final = "{#- stage.template: NAME -#}\n"
_OWN: Final = "{#- The tokenizer's own template. #}\n"

# A list of parts becomes one string, and a string becomes a list for roles that want one.  The loop
# over message.content, with filters at most, is how vLLM sees that lists are accepted.
_CONTENT: Final = """\
{%- set moiie = namespace(messages=[], text="", image=IMAGE, lists=ROLES) -%}
{%- for message in messages -%}
    {%- set moiie.text = message.content | default("") -%}
    {%- if moiie.text is not string -%}
        {%- set moiie.text = "" -%}
        {%- for part in message.content | default([], true) -%}
            {%- if part.type == "image" -%}
                {%- set moiie.text = moiie.text + moiie.image + "\\n" -%}
            {%- elif part.type == "text" -%}
                {%- set moiie.text = moiie.text + part.text -%}
            {%- else -%}
                {{- raise_exception("A message has a part of another type than text and image.") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message.role in moiie.lists -%}
        {%- set moiie.text = [{"type": "text", "text": moiie.text}] -%}
    {%- endif -%}
    {%- set moiie.messages = moiie.messages + [dict(message, content=moiie.text)] -%}
{%- endfor -%}
{%- set messages = moiie.messages -%}
"""

_CLOCK: Final = """\
{%- macro strftime_now(format) -%}
    {%- set moiie = namespace(text=format) -%}
    {%- for code, value in DATE -%}
        {%- set moiie.text = moiie.text.replace(code, value) -%}
    {%- endfor -%}
    {{- moiie.text -}}
{%- endmacro -%}
"""

_REASONING: Final = "{%- set enable_thinking = enable_thinking | default(false) -%}\n"

_PLAIN: Final = """\
{%- set caption = namespace(images=0, text=none) -%}
{%- for message in messages -%}
    {%- set caption.images = caption.images + message.content.count(moiie.image) -%}
    {%- if message.role == "assistant" -%}
        {%- set caption.text = message.content.replace(moiie.image, "").strip() -%}
    {%- endif -%}
{%- endfor -%}
{{- moiie.image * caption.images -}}
{%- if caption.text is not none and not add_generation_prompt -%}
    {{- caption.text + END -}}
{%- endif -%}
"""

_MARKERS: Final = """\
{%- for message in messages -%}
    {{- BEFORE + message.role + AFTER + TEXT + END -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- BEFORE + "assistant" + AFTER -}}
{%- endif -%}
"""


def plain_jinja(bos: str, eos: str, image_token: str) -> str:
    """``plain`` as a chat template.

    Args:
        bos: In front of the text; may be empty.
        eos: Behind the caption.
        image_token: Stands for an image in the text.
    """
    return _start("plain", bos, image_token) + _filled(_PLAIN, END=_quoted(eos))


def markers_jinja(chat: ChatFormat, bos: str, image_token: str) -> str:
    """A format with markers around every turn as a chat template (arguments: ``plain_jinja``)."""
    before, after = chat.header.split("{role}")
    body = _filled(
        _MARKERS,
        BEFORE=_quoted(before),
        AFTER=_quoted(after),
        TEXT="message.content.strip()" if chat.strips else "message.content",
        END=_quoted(chat.end + chat.gap),
    )
    begin = chat.begin if chat.begin.startswith(bos) else bos + chat.begin
    return _start(chat.name, begin, image_token) + body


def tokenizer_jinja(template: str, bos: str, image_token: str, lists: Sequence[str] = ()) -> str:
    """A tokenizer's own template, made to write the same text everywhere.

    Args:
        template: As published.
        bos: Where the template does not write it itself; may be empty.
        image_token: Stands for an image in the text.
        lists: Roles whose content the template wants as a list of parts.
    """
    codes = [f"%-{code}" for code in "dmHIj"] + [f"%{code}" for code in _DATE_CODES]
    date = [[code, FIXED_DATE.strftime(code)] for code in codes]
    clock = _filled(_CLOCK, DATE=_quoted(date)) if "strftime_now" in template else ""
    reasoning = _REASONING if "enable_thinking" in template else ""
    start = _start("tokenizer", bos, image_token, lists)
    return start + clock + reasoning + _OWN + template


def name_in(jinja: str) -> str | None:
    """The ``stage.template`` that a template of this module was made from, else None."""
    match = re.match(re.escape(_NAME).replace("NAME", "(.+?)"), jinja)
    return match[1] if match else None


def own_template(jinja: str) -> str:
    """The tokenizer's own template in one of this module; another text as it is."""
    return jinja.partition(_OWN)[2] if name_in(jinja) == "tokenizer" else jinja


def _start(name: str, begin: str, image_token: str, lists: Sequence[str] = ()) -> str:
    content = _filled(_CONTENT, IMAGE=_quoted(image_token), ROLES=_quoted(list(lists)))
    written = "{{- " + _quoted(begin) + " -}}\n" if begin else ""
    return _filled(_NAME, NAME=name) + content + written


def _filled(text: str, **values: str) -> str:
    """Words in capitals replaced by values, in one pass."""
    return re.sub(r"\b[A-Z]+\b", lambda match: values.get(match[0], match[0]), text)


def _quoted(value: object) -> str:
    """A literal in Jinja, which reads the escapes of JSON."""
    return json.dumps(value, ensure_ascii=False)
