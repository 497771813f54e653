"""YAML of configuration files: PyYAML's safe loader with two changes.

In YAML 1.1 ``1e-3`` (without a dot) is text, and the last of repeated keys is used.  Here ``1e-3``
is a number, as in YAML 1.2, and a repeated key is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from moiie_megatron.utils.errors import UserError

_FLOAT_TAG = "tag:yaml.org,2002:float"
_EXPONENT_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z")
_FLOAT_STARTS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """With the loader's rule for numbers, so that the *text* ``1e-3`` is written in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT_TAG, _EXPONENT_FLOAT, _FLOAT_STARTS)


def parse(text: str, where: str) -> Any:
    """The value written in ``text``.

    Args:
        text: One YAML document.
        where: What the text is, for the error message (a file name).

    Raises:
        UserError: Broken YAML; the sentence names ``where``, the line and the problem.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line} is not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, ValueError) as error:
        # Characters that YAML forbids, or a date such as 2024-99-99.
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{where} is not valid YAML: {reason}.") from None


def write(value: Any, *, flow: bool = False) -> str:
    """``value`` as YAML text that ``parse`` reads back unchanged; keys keep their order.

    Args:
        value: Mappings, lists, texts, numbers, booleans and None.
        flow: Write ``[a, b]`` on one line instead of blocks.
    """
    width = float("inf") if flow else None
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=width)
