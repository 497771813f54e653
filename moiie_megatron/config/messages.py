"""One-sentence messages about configurations that do not fit the schema."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

from pydantic import BaseModel, ValidationError

from moiie_megatron.config import yaml_text
from moiie_megatron.config.renamed_keys import RENAMED
from moiie_megatron.config.section import MAX_FLOAT, MAX_INT, MAX_SEED, MIN_FLOAT

# Limits of types, which are told only where a value is beyond them.
_WIDE = (MIN_FLOAT, MAX_FLOAT, -MAX_INT, MAX_INT, MAX_SEED)
_MAX_VALUE_LENGTH = 80


def show(value: Any) -> str:
    """A value as Python writes it, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else text[:_MAX_VALUE_LENGTH] + "..."


def listed(names: Iterable[object], last: str = "or") -> str:
    """``a, b or c``."""
    words = [str(name) for name in names]
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def divisors(number: int) -> str:
    """The divisors of ``number`` as text, or ``a divisor of`` it if there are more than eight."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    return listed(divisors) if len(divisors) <= 8 else f"a divisor of {number}"


def unknown_key(key: str, name: str, allowed: Sequence[str]) -> str:
    """The sentence about a key that does not exist, with the most similar one that does.

    Args:
        key: The full dotted key.
        name: Its last part, which is compared with ``allowed``.
        allowed: The names of existing keys.
    """
    if key in RENAMED:
        return f"{key} is not a known key: it is called {RENAMED[key]} now."
    if not allowed:
        return f"{key} is not a known key: use text."
    close = difflib.get_close_matches(name, allowed, n=1)
    instead = f"did you mean {close[0]}?" if close else f"use {listed(sorted(allowed))}."
    return f"{key} is not a known key: {instead}"


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """A sentence about the first problem that pydantic found, and the number of problems.

    Unknown keys come first, because a misspelt key is reported as a missing one too.
    """
    schema = model.model_json_schema()
    problems: dict[str, str] = {}
    details = sorted(error.errors(), key=lambda e: not _is_unknown_key(e))
    for detail in details:
        key, sentence = _sentence(detail, schema)
        problems.setdefault(key, sentence)
    # Each member of a union reports its own error, about the key or about a key below it; keep
    # the deeper one, which is more specific.
    problems = {
        key: sentence
        for key, sentence in problems.items()
        if not any(other.startswith(f"{key}.") for other in problems)
    }
    first = next(iter(problems.values()))
    if len(problems) == 1:
        return first
    return f"{first[:-1]} (the first of {len(problems)} problems){first[-1]}"


def _is_unknown_key(detail: Any) -> bool:
    return detail["type"] in ("extra_forbidden", "invalid_key") or detail["loc"][-1:] == ("[key]",)


def _sentence(detail: Any, schema: dict[str, Any]) -> tuple[str, str]:
    """The dotted key of a pydantic error, and the sentence about it."""
    defs = schema.get("$defs", {})
    path: list[str] = []
    node = resolve(schema, defs)
    parent = node
    for part in detail["loc"]:
        child = _child(node, part, defs)
        if child is None:
            if _is_unknown_key(detail) and part != "[key]":
                return _unknown(path, str(part), node)
            continue  # pydantic's name of a union member
        parent, node = node, child
        path.append(str(part))
    key = ".".join(path)
    if _is_unknown_key(detail):
        return _unknown(path[:-1], path[-1], parent)
    if detail["type"] == "missing":
        return key, f"{key} is missing: give {describe(node, defs)}."
    return key, f"{key} is {show(detail['input'])}: use {advice(detail, node, defs)}."


def advice(detail: Any, node: dict[str, Any], defs: dict[str, Any]) -> str:
    """What to use instead of a value that pydantic has refused.

    Args:
        detail: The error, from ``ValidationError.errors()``.
        node: The JSON schema of the value.
        defs: The definitions of the whole schema (``$defs``).
    """
    return describe(node, defs) + _wide_limit(detail) + _hint(detail)


def _wide_limit(detail: Any) -> str:
    """The limit of its type that a number is beyond, which ``describe`` leaves out."""
    context = detail.get("ctx", {})
    for name, words in (("le", "at most"), ("ge", "at least")):
        limit = context.get(name)
        if limit in _WIDE and (name == "le" or detail["input"] > 0):
            return f", {words} {limit if isinstance(limit, int) else format(limit, 'g')}"
    return ""


def _hint(detail: Any) -> str:
    """What the type of the value does not say: YAML reads a text without quotes as a number."""
    kind, value = detail["type"], detail["input"]
    if kind == "string_too_short":
        return " that is not empty"
    if kind == "string_type" and isinstance(value, bool | int | float | date):
        return " in quotes"
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        read = yaml_text.scalar(value)
        if isinstance(read, bool if kind == "bool_type" else int | float):
            return " without quotes"
    return ""


def _unknown(path: list[str], name: str, node: dict[str, Any]) -> tuple[str, str]:
    key = ".".join([*path, name])
    allowed = list(node.get("properties", {})) or node.get("propertyNames", {}).get("enum", [])
    return key, unknown_key(key, name, allowed)


def resolve(node: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference, or the one reference of ``Section | None``, points to.

    Args:
        node: A part of a JSON schema.
        defs: The definitions of the whole schema (``$defs``).
    """
    if "$ref" in node:
        return dict(defs[node["$ref"].rsplit("/", 1)[-1]])
    members = [m for m in node.get("anyOf", []) if m.get("type") != "null"]
    return resolve(members[0], defs) if len(members) == 1 and "$ref" in members[0] else node


def _child(node: dict[str, Any], part: str | int, defs: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of a key or list item; None if ``part`` is not part of the user's data."""
    if isinstance(part, int):
        lists = [m for m in [node, *node.get("anyOf", [])] if "items" in m]
        return resolve(lists[0]["items"], defs) if lists else None
    if part in node.get("properties", {}):
        return resolve(node["properties"][part], defs)
    values = node.get("additionalProperties")
    if isinstance(values, dict) and part != "[key]":
        return resolve(values, defs)
    return None


def describe(node: dict[str, Any], defs: dict[str, Any]) -> str:
    """The values that a schema allows, in words.

    Args:
        node: A part of a JSON schema.
        defs: The definitions of the whole schema (``$defs``).
    """
    if "anyOf" in node:
        return " or ".join(describe(resolve(m, defs), defs) for m in node["anyOf"])
    if "enum" in node:
        return listed(node["enum"])
    if "properties" in node:
        return f"a mapping with the keys {listed(node['properties'], 'and')}"
    kind = node.get("type")
    if kind == "array":
        count = node.get("minItems")
        what = "list" if count is None else f"list of {count}"
        return f"a {what} ({describe(resolve(node['items'], defs), defs)} each)"
    if kind == "object":
        names = node.get("propertyNames", {}).get("enum")
        return f"a mapping with keys from {listed(names, 'and')}" if names else "a mapping"
    if kind in ("integer", "number"):
        return "a whole number" + _bounds(node) if kind == "integer" else "a number" + _bounds(node)
    return {"boolean": "true or false", "string": "text", "null": "null"}.get(str(kind), "a value")


def _bounds(node: dict[str, Any]) -> str:
    """The limits of a number in words, without those of its type."""
    words = []
    lower, above = node.get("minimum"), node.get("exclusiveMinimum")
    upper, below = node.get("maximum"), node.get("exclusiveMaximum")
    if lower == MIN_FLOAT:
        lower, above = None, 0
    lower, upper = (None if limit in _WIDE else limit for limit in (lower, upper))
    if lower is not None and upper is not None:
        words.append(f"from {lower:g} to {upper:g}")
    elif lower is not None and below is not None:
        words.append(f"from {lower:g} to below {below:g}")
    else:
        words += [f"not below {lower:g}"] if lower is not None else []
        words += [f"above {above:g}"] if above is not None else []
        words += [f"not above {upper:g}"] if upper is not None else []
    return " " + " and ".join(words) if words else ""
