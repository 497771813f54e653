"""Links lead somewhere; files, names and keys in back quotes exist."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.docs.markdown import PAGES, ROOT, anchors, inline_code, links, name
from tests.docs.schema_keys import SECTIONS, is_key

SOURCES = ("moiie_megatron", "tools", "examples", "benchmarks", "tests")
_FILE = re.compile(r"[\w.\-]+(/[\w.\-]+)*\.(py|md|yaml|sh|toml|cff|sbatch|svg|txt)")
_WRITTEN = re.compile(r"[\w.\-]+\.(jsonl?|npy|html|png)")  # by the programs, at run time
_DIRECTORY = re.compile(r"[\w.\-]+(/[\w.\-]+)*/")
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_KEY = re.compile(rf"({'|'.join(SECTIONS)})((\.[a-z_]\w*)+)(=.*|:.*)?", re.DOTALL)

# Names that only tables of old names and foreign programs have.
_ELSEWHERE = {
    "CHANGELOG.md": {"keepachangelog"},
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_in_back_quotes_exist(page: Path) -> None:
    assert [code for code in _codes(page) if _FILE.fullmatch(code) and not _exists(code, page)] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_programs_write_has_that_name_in_their_source(page: Path) -> None:
    unknown = []
    for code in _codes(page):
        if _WRITTEN.fullmatch(code) and not code[0].isupper():
            unknown += [] if code in _text() or _exists(code, page) else [code]
        if _DIRECTORY.fullmatch(code) and not _exists(code, page):
            unknown += [] if re.search(rf"[\"'/{{}}]{code.rstrip('/')}[\"'/]", _text()) else [code]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_configuration_keys_are_in_the_schema(page: Path) -> None:
    wrong = []
    for code in _codes(page):
        found = _KEY.fullmatch(code)
        if found and not _FILE.fullmatch(code) and not is_key(found[1] + found[2]):
            wrong.append(code)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_of_code_are_in_the_code(page: Path) -> None:
    """Classes, functions and fields: words with an underscore or a capital inside."""
    unknown = []
    for code in _codes(page):
        if not _NAME.fullmatch(code) or _FILE.fullmatch(code) or _KEY.fullmatch(code):
            continue
        parts = [part for part in code.split(".") if re.search(r"_|[a-z][A-Z]|^[A-Z][a-z]", part)]
        unknown += [part for part in parts if part not in _words()]
    assert unknown == []


def _codes(page: Path) -> Iterator[str]:
    """Inline code; placeholders such as OUTPUT/x are not names of anything."""
    for code in inline_code(page):
        if not re.search(r"(^|/)[A-Z_]{3,}(/|$|\.)", code) or (ROOT / code).exists():
            yield code


def _exists(code: str, page: Path) -> bool:
    """From the page, the root, the package, or Megatron; a bare name anywhere in the project."""
    roots = (page.parent, ROOT, ROOT / "moiie_megatron", _megatron().parents[1])
    if any((root / code).exists() for root in roots):
        return True
    return "/" not in code and code in _file_names()


@cache
def _file_names() -> frozenset[str]:
    return frozenset(path.name for folder in SOURCES for path in (ROOT / folder).rglob("*.*"))


def _megatron() -> Path:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@cache
def _text() -> str:
    """Everything that the project runs."""
    files = [p for folder in SOURCES for p in sorted((ROOT / folder).rglob("*.py"))]
    files = [p for p in files if p.relative_to(ROOT).parts[:2] != ("tests", "docs")]
    files += sorted((ROOT / "examples").rglob("*.sh")) + [ROOT / "Makefile"]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@cache
def _words() -> frozenset[str]:
    return frozenset(re.findall(r"\w+", _text()))
