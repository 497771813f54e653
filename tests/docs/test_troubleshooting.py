"""The error sentences of the troubleshooting page are those of the programs."""

from __future__ import annotations

import ast
import re
from functools import cache

from tests.docs.doc_pages import ROOT

PAGE = ROOT / "docs/troubleshooting.md"
_PROGRAMS = ("moiie_megatron", "tools", "examples")
# What stands for a value in a quoted sentence, and so for any text in the program's.
_VALUES = re.compile(r"\.\.\.|\(\.\.\.\)|\b[A-Z]{1,10}\b|'[A-Z]'|\d+")
_SHORTEST = 8  # characters between two values that say where a sentence comes from


@cache
def _sentences() -> str:
    """All texts in the programs, with a line break where a value is put in."""
    texts = []
    for folder in _PROGRAMS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "\n" for p in node.values]
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def _rows() -> list[list[str]]:
    lines = PAGE.read_text().splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| `")]
    assert len(rows) > 20
    return rows


def test_every_row_has_a_cause_and_a_remedy() -> None:
    assert [row for row in _rows() if len(row) != 3 or not all(cell.strip() for cell in row)] == []


def test_every_fragment_is_in_a_program() -> None:
    fragments = [code for row in _rows() for code in re.findall(r"`([^`]+)`", row[0])]
    pieces = [piece.strip() for code in fragments for piece in _VALUES.split(code)]
    long = [piece for piece in pieces if len(piece) >= _SHORTEST]
    assert len(long) >= len(_rows())
    assert [piece for piece in long if piece not in _sentences()] == []
