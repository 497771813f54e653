"""One legend of shape letters, in ``moe/__init__.py``: cited where letters are used, and whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import moiie_megatron.moe

PACKAGE = Path(moiie_megatron.moe.__file__).parents[1]
FILES = sorted(
    path
    for folder in ("moe", "vlm", "mcore", "routing_stats")
    for path in (PACKAGE / folder).rglob("*.py")
    if path != PACKAGE / "moe/__init__.py"
)
CITATION = "see ``moe/__init__.py``"
LEGEND = moiie_megatron.moe.__doc__ or ""
SUFFIXED = re.compile(r"\b[a-z][a-z0-9_]*_([A-Z]+1?|[bsih]+[pyhsb]+)\b")
UPPER = set(re.findall(r"^    ([A-Z])  ", LEGEND, re.MULTILINE))
LOWER = set(re.findall(r"(?:^    |   )([a-z])  ", LEGEND, re.MULTILINE))


def suffixes(path: Path) -> set[str]:
    """Suffixes of names that list axes, such as TE in ``probs_TE``."""
    words = SUFFIXED.finditer(path.read_text(encoding="utf-8"))
    return {match[1] for match in words if match[1].isupper() or match[1].rstrip("1").isupper()}


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_the_legend_is_found() -> None:
    assert set("TDFEPLKGWMANRXZ") == UPPER
    assert set("bshngdcipy") == LOWER
    assert len(FILES) > 30 and {"TE", "T"} <= suffixes(PACKAGE / "moe/router.py")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_letters_are_the_legends(path: Path) -> None:
    unknown = {suffix for suffix in suffixes(path) if set(suffix) - UPPER - {"1", "2"}}
    assert unknown == set()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_cite_the_legend_and_have_none_of_their_own(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "Shapes:" not in text
    if suffixes(path):
        assert CITATION in text
