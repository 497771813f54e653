"""Generate ``docs/megatron-section.md`` from the tables of the section.

``python -m moiie_megatron.config.megatron_section.reference > docs/megatron-section.md``
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

from pydantic import TypeAdapter

from moiie_megatron.config.megatron_section.allowed import ALLOWED
from moiie_megatron.config.megatron_section.owned import OWNED
from moiie_megatron.config.megatron_section.refused import REFUSED
from moiie_megatron.config.messages import describe

_INTRODUCTION: Final = """\
# The megatron section

<!-- Generated:
python -m moiie_megatron.config.megatron_section.reference > docs/megatron-section.md -->

`megatron:` in a configuration sets fields of Megatron-Core's `TransformerConfig`. Those that have
been tried with this model may be set; every other field is an error with a reason. The tables have
all fields of Megatron-Core 0.16 and 0.19; `tests/unit/mcore/test_megatron_section.py` takes a
training step with each field of the first table, and fails when the installed version has a field
that is in no table.
"""

_ALLOWED: Final = """\
## Fields that may be set

Losses and gradients are compared with those of a step without the field. Null is the same as
leaving the field out.
"""

_OWNED: Final = """\
## Fields that another key sets
"""

_REFUSED: Final = """\
## Fields that are refused

`*` stands for any characters.
"""


def render() -> str:
    """The page as Markdown."""
    allowed = [
        (f"`{name}`", _values(field.kind), field.effect, field.needs or "-", field.losses)
        for name, field in ALLOWED.items()
    ]
    owned: dict[str, list[str]] = {}
    for name, key in OWNED.items():
        owned.setdefault(key, []).append(name)
    refused = [
        (_codes(refused.names), refused.reason, _sentence(refused.instead)) for refused in REFUSED
    ]
    blocks = [
        _INTRODUCTION,
        _ALLOWED,
        _table(("Field", "Values", "Effect", "Needs", "Losses and gradients"), allowed),
        _OWNED,
        _table(("Key", "Fields"), [(f"`{key}`", _codes(names)) for key, names in owned.items()]),
        _REFUSED,
        _table(("Fields", "Reason", "Instead"), refused),
    ]
    return "\n".join(blocks)


def _values(kind: Any) -> str:
    return describe(TypeAdapter(kind).json_schema(), {}).removeprefix("a ")


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _sentence(instead: str) -> str:
    return "-" if instead == "leave it out" else instead


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])


if __name__ == "__main__":
    sys.stdout.write(render())
