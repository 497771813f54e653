"""Whether a dotted name is a key of the configuration."""

from __future__ import annotations

import ast
import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from moiie_megatron.config.schema import RunConfig
from tests.docs.doc_pages import megatron_core

SECTIONS = tuple(RunConfig.model_fields)


def is_key(key: str) -> bool:
    """Whether an override may start with ``key=``."""
    first, *rest = key.split(".")
    if first not in SECTIONS:
        return False
    if first == "megatron":
        return len(rest) == 1 and rest[0] in megatron_fields()
    return _has(RunConfig.model_fields[first].annotation, rest)


def _has(kind: Any, keys: list[str]) -> bool:
    if not keys:
        return True
    kind = _section(kind)
    if get_origin(kind) is dict:
        name_type = get_args(kind)[0]
        names = get_args(name_type) if get_origin(name_type) is Literal else keys[:1]
        return keys[0] in names and len(keys) == 1
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return False
    if keys == ["preset"]:
        return True
    return keys[0] in kind.model_fields and _has(kind.model_fields[keys[0]].annotation, keys[1:])


def _section(kind: Any) -> Any:
    """Without ``| None``."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


@cache
def megatron_fields() -> frozenset[str]:
    """The fields of Megatron's TransformerConfig, from its source: importing it takes seconds."""
    sources = [
        (megatron_core() / file).read_text(encoding="utf-8")
        for file in ("model_parallel_config.py", "transformer/transformer_config.py")
    ]
    return frozenset(
        node.target.id
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
