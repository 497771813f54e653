"""Generate ``docs/configuration.md`` from the schema and the presets.

``python -m moiie_megatron.config.reference > docs/configuration.md``
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from moiie_megatron.config import yaml_text
from moiie_megatron.config.load import preset_files, preset_names
from moiie_megatron.config.messages import describe, resolve
from moiie_megatron.config.schema import RunConfig

_INTRODUCTION = """\
# Configuration

<!-- Generated: python -m moiie_megatron.config.reference > docs/configuration.md -->

A run is one YAML file with the sections below. Unknown keys, wrong types and impossible
combinations are errors that name the key, its value and the remedy; `tools/train.py CONFIG
--dry-run` checks a file without training.

- **Overrides**: `tools/train.py CONFIG train.steps=100 moe.layers=all`. The value is YAML.
- **Presets**: `language: {preset: llama3-8b, pretrained: weights/llama}` starts from the values of
  a preset, and the other keys replace single ones.
- **Base file**: `base: stage1.yaml` (relative to the file that names it) starts from another file.
  Mappings are merged key by key; lists and single values are replaced.
- **Environment variables**: `${NAME}` in a value; `$${NAME}` is the text `${NAME}`.
- **Paths** are relative to the current directory.

The resolved configuration of a run is written to `OUTPUT/config.yaml`. The checks are in
`moiie_megatron/config/validate.py`, the schema in `moiie_megatron/config/schema.py` and
`moiie_megatron/config/model_schema.py`.
"""


def render() -> str:
    """The page as Markdown."""
    schema = RunConfig.model_json_schema()
    defs = schema["$defs"]
    top = [key for key, node in schema["properties"].items() if not _fields(node, defs)]
    blocks = [
        _INTRODUCTION,
        "## Top level\n",
        _table(schema, defs, top),
        *_sections("", schema, defs),
        "## Presets\n",
        *_presets(list(schema["properties"])),
    ]
    return "\n".join(blocks)


def _sections(prefix: str, schema: dict[str, Any], defs: dict[str, Any]) -> Iterator[str]:
    """Heading, description and table of every section below ``prefix``."""
    for key, node in schema["properties"].items():
        inner = _fields(node, defs)
        if inner is None:
            continue
        is_list = node.get("type") == "array"
        name = f"{prefix}{key}[]" if is_list else f"{prefix}{key}"
        yield f"{'###' if prefix else '##'} {name}\n"
        yield _paragraph(inner.get("description", "")) + "\n"
        yield _table(inner, defs, list(inner["properties"]))
        yield from _sections(f"{name}.", inner, defs)


def _paragraph(text: str) -> str:
    """Lines of at most 100 characters; links, which may have hyphens, stay whole."""
    return textwrap.fill(_markdown(text), 100, break_on_hyphens=False)


def _fields(node: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of a section or of the items of a list of sections; None for a plain value."""
    inner = resolve(node.get("items", node), defs)
    return inner if "properties" in inner else None


def _table(schema: dict[str, Any], defs: dict[str, Any], keys: list[str]) -> str:
    rows = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    for key in keys:
        node = schema["properties"][key]
        inner = _fields(node, defs)
        if inner is not None and "default" in node and node["default"] is not None:
            default = "see below"
        elif "default" in node:
            default = f"`{_yaml(node['default'])}`"
        else:
            default = "required"
        kind = _type(node, inner, defs)
        meaning = _markdown(node.get("description", ""))
        rows.append(f"| `{key}` | {kind} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _type(node: dict[str, Any], inner: dict[str, Any] | None, defs: dict[str, Any]) -> str:
    if inner is None:
        return describe(node, defs).removeprefix("a ").replace(" or null", " or `null`")
    kind = "list of mappings" if node.get("type") == "array" else "mapping"
    return (
        f"{kind} or `null`" if any(m.get("type") == "null" for m in node.get("anyOf", ())) else kind
    )


def _yaml(value: Any) -> str:
    return yaml_text.write([value], flow=True).strip().removeprefix("[").removesuffix("]")


def _markdown(text: str) -> str:
    """A docstring as one paragraph of Markdown that may stand in a table."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def _presets(sections: list[str]) -> Iterator[str]:
    for section in sections:
        names = preset_names(section)
        if not names:
            continue
        yield f"### {section}.preset\n"
        yield "| Preset | Values |"
        yield "|---|---|"
        for name in names:
            text = preset_files()[name].read_text(encoding="utf-8")
            values = yaml_text.parse(text, where=name)[section]
            yield f"| `{name}` | {', '.join(f'`{k}: {_yaml(v)}`' for k, v in values.items())} |"
        yield ""


if __name__ == "__main__":
    sys.stdout.write(render())
