"""YAML of configuration files: PyYAML's safe loader without its surprises.

In YAML 1.1 ``1e-3`` (without a dot) is text, and the last of repeated keys is used.  Here ``1e-3``
is a number, as in YAML 1.2, and a repeated key is an error.  So are numbers that YAML 1.1 and 1.2
read differently, ``010`` (8 or 10) and ``1:30`` (90 or text), and documents that are nested or
repeated (by aliases) beyond any use.
"""

from __future__ import annotations

import re
from typing import Any, Final

import yaml

from moiie_megatron.utils.errors import UserError

MAX_CHARACTERS: Final = 1 << 20  # of a document
_MAX_DEPTH = 50
_MAX_EXPANDED = 2 * MAX_CHARACTERS  # characters and nodes, where every alias is written out
_MAX_BITS = 256  # of a whole number
_FLOAT_TAG = "tag:yaml.org,2002:float"
_EXPONENT_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z")
_FLOAT_STARTS = list("-+.0123456789")
_OCTAL = re.compile(r"[-+]?0[0-9_]+\Z")
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")  # in paths and in UTF-8


class _Loader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self._depth > _MAX_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise _problem(f"it is nested more than {_MAX_DEPTH} deep", event)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        found = _UNUSABLE.search(node.value)
        if found:
            raise _problem(f"the character {found.group()!r} is in a text", node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                raise _problem(f"the key {key.value!r} is given twice", key)
            seen.add(key.value)
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _check_expanded(node, {}, set())
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # A date such as 2024-99-99, a number of more than 4300 digits, `!!int x`.
            kind = node.tag.rpartition(":")[2]
            raise _problem(f"{_short(node)} is no {kind}", node) from None

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number that every reader of YAML takes for the same one."""
        text = self.construct_scalar(node)
        if _OCTAL.match(text) or ":" in text:
            number = f"write {int(text)} for the number, or " if ":" not in text else ""
            raise _problem(
                f"{_short(node)} is another number in YAML 1.1 than in 1.2, "
                f"{number}put the text in quotes",
                node,
            )
        if node.tag == _FLOAT_TAG:
            return float(self.construct_yaml_float(node))
        value = int(self.construct_yaml_int(node))
        if value.bit_length() > _MAX_BITS:
            raise _problem(f"{_short(node)} is too large", node)
        return value


class _Dumper(yaml.SafeDumper):
    """With the loader's rule for numbers, so that the *text* ``1e-3`` is written in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT_TAG, _EXPONENT_FLOAT, _FLOAT_STARTS)
for _tag in (_FLOAT_TAG, "tag:yaml.org,2002:int"):
    _Loader.add_constructor(_tag, _Loader.construct_number)


def parse(text: str, where: str) -> Any:
    """The value written in ``text``.

    Args:
        text: One YAML document.
        where: What the text is, for the error message (a file name).

    Raises:
        UserError: Broken YAML, or a document that is too large; the sentence names ``where``, the
            line and the problem.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{where} has more than {MAX_CHARACTERS:,} characters: name a YAML file of settings or "
            "of sources, not one of records."
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line} is not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:  # characters that YAML forbids
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{where} is not valid YAML: {reason}.") from None


def scalar(text: str) -> Any:
    """What ``text`` is without quotes; ``text`` itself where that is no valid YAML."""
    try:
        return parse(text, "")
    except UserError:
        return text


def write(value: Any, *, flow: bool = False) -> str:
    """``value`` as YAML text that ``parse`` reads back unchanged; keys keep their order.

    Args:
        value: Mappings, lists, texts, numbers, booleans and None.
        flow: Write ``[a, b]`` on one line instead of blocks.
    """
    width = float("inf") if flow else None
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=width)


def _check_expanded(
    node: yaml.Node, known: dict[int, tuple[int, int]], above: set[int]
) -> tuple[int, int]:
    """Height and size of a node with every alias written out.

    Args:
        node: A node of a document.
        known: The results by the ids of the nodes.
        above: Ids of the nodes that hold this one.

    Raises:
        MarkedYAMLError: A node that holds itself, or one that is too large.
    """
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise _problem("it holds an alias of itself", node)
    if isinstance(node, yaml.ScalarNode):
        return known.setdefault(id(node), (0, 1 + len(node.value)))
    above.add(id(node))
    pairs = isinstance(node, yaml.MappingNode)
    children = [child for pair in node.value for child in pair] if pairs else node.value
    found = [_check_expanded(child, known, above) for child in children]
    above.discard(id(node))
    height = 1 + max((height for height, _ in found), default=0)
    size = 1 + sum(size for _, size in found)
    if height > _MAX_DEPTH or size > _MAX_EXPANDED:
        raise _problem("its aliases make it too large", node)
    return known.setdefault(id(node), (height, size))


def _short(node: yaml.Node) -> str:
    text = repr(node.value)
    return text if len(text) <= 40 else text[:40] + "..."


def _problem(what: str, place: Any) -> yaml.MarkedYAMLError:
    """An error at the start of a node or an event."""
    return yaml.MarkedYAMLError(problem=what, problem_mark=place.start_mark)
