"""Generate ``docs/megatron-section.md`` from the tables of the sections.

``python -m moiie_megatron.config.megatron_section.reference > docs/megatron-section.md``
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

from pydantic import TypeAdapter

from moiie_megatron.config.megatron_section.sections import SECTIONS
from moiie_megatron.config.megatron_section.table import MegatronSection
from moiie_megatron.config.messages import describe

_INTRODUCTION: Final = """\
# Sections that set fields of Megatron-Core

<!-- Generated:
python -m moiie_megatron.config.megatron_section.reference > docs/megatron-section.md -->

Three sections of a configuration set fields of Megatron-Core's configuration classes:

| Section | Class | What it is for |
|---|---|---|
| [`megatron`](#megatron) | `TransformerConfig` | recomputation, fused kernels, dropout |
| [`ddp`](#ddp) | `DistributedDataParallelConfig` | reductions of gradients, gathers of weights |
| [`optimizer.megatron`](#optimizermegatron) | `OptimizerConfig` | place and dtype of its states |

Fields that have been tried with this model may be set; every other field is an error with a
reason. The tables have all fields of Megatron-Core 0.16 and 0.19. Tests in `tests/unit/mcore` and
`tests/te` take training steps with each field that may be set, and fail when the installed version
has a field that is in no table. In all sections, null is the same as leaving a field out.
"""

_COMPARED: Final = {
    "megatron": "Losses and gradients are compared with those of a step without the field.",
    "ddp": "Losses, gradients and updated weights are compared with those without the field.",
    "optimizer.megatron": "Updated weights are compared with those without the field.",
}


def render() -> str:
    """The page as Markdown."""
    return "\n".join([_INTRODUCTION, *(_section(section) for section in SECTIONS)])


def _section(section: MegatronSection) -> str:
    """Heading and tables of one section."""
    allowed = [
        (f"`{name}`", _values(field.kind), field.effect, field.needs or "-", field.losses)
        for name, field in section.allowed.items()
    ]
    owned: dict[str, list[str]] = {}
    for name, key in section.owned.items():
        owned.setdefault(key, []).append(name)
    refused = [
        (_codes(refused.names), refused.reason, _sentence(refused.instead))
        for refused in section.refused
    ]
    blocks = [
        f"## {section.key}\n\nFields of `{section.class_name}`.\n",
        f"### Fields of {section.key} that may be set\n\n{_COMPARED[section.key]}\n",
        _table(("Field", "Values", "Effect", "Needs", "Difference"), allowed),
        f"### Fields of {section.key} that another key sets\n",
        _table(("Key", "Fields"), [(f"`{key}`", _codes(names)) for key, names in owned.items()]),
        f"### Fields of {section.key} that are refused\n\n`*` stands for any characters.\n",
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
