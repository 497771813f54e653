"""Links lead somewhere; files, names and keys in back quotes exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.docs.doc_pages import PAGES, ROOT, anchors, inline_code, links, megatron_core, name
from tests.docs.schema_keys import SECTIONS, is_key, megatron_fields

PROGRAMS = ("moiie_megatron", "tools", "examples", "benchmarks", "serving")
SOURCES = (*PROGRAMS, "tests")
_FILE = re.compile(r"[\w.\-]+(/[\w.\-]+)*\.(py|md|yaml|sh|toml|cff|sbatch|svg|txt)")
_WRITTEN = re.compile(r"[\w.\-]+\.(jsonl?|yaml|npy|html|log)")  # by the programs, at run time
_DIRECTORY = re.compile(r"[\w.\-]+(/[\w.\-]+)*/")
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_KEY = re.compile(rf"({'|'.join(SECTIONS)})((\.[a-z_]\w*)+)(=.*|:.*)?", re.DOTALL)

# Of Kubernetes, NCCL and others' programs, and of newer versions of Megatron-Core.
_ELSEWHERE = {
    *("terminationGracePeriodSeconds", "emptyDir", "envFrom", "ConfigMap", "Terminating"),
    *("HybridModel", "TransformerBlock", "output_processor"),
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_names_exists(page: Path) -> None:
    found = {rule.__name__: list(rule(page)) for rule in RULES}
    assert found == {rule.__name__: [] for rule in RULES}


def test_the_rules_themselves(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page, with a title\n\n[good](#a-page-with-a-title) [bad](#no) [bad](no.md)\n"
        "`moe/router.py` `moe/no.py` `routing.jsonl` `no.jsonl` `layout/` `nowhere/`\n"
        "`moe.top_k` `moe.topk=2` `megatron.num_moe_experts` `megatron.no` `stage.preset`\n"
        "`ExpertLayout.name` `ExpertLayuot.name` `Batch.tokns`\n"
        "`padding_mask` `padding_maks` `OUTPUT/no.py`\n"
    )
    assert {rule.__name__: list(rule(page)) for rule in RULES} == {
        "broken_links": ["#no", "no.md"],
        "missing_files": ["moe/no.py"],
        "never_written": ["no.jsonl", "nowhere/"],
        "unknown_keys": ["moe.topk=2", "megatron.no"],
        "unknown_names": ["ExpertLayuot", "Batch.tokns", "padding_maks"],
    }


def broken_links(page: Path) -> Iterator[str]:
    """Relative links to files that are not there, and to headings that are not."""
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def missing_files(page: Path) -> Iterator[str]:
    """Files of the project, or of Megatron-Core."""
    for code in _codes(page):
        is_file = _FILE.fullmatch(code) and not _WRITTEN.fullmatch(code)
        if is_file and not _exists(code, page):
            yield code


def never_written(page: Path) -> Iterator[str]:
    """Files and directories of a run: programs must hold their names."""
    programs = _text(*PROGRAMS)
    for code in _codes(page):
        if _WRITTEN.fullmatch(code) and code not in programs and not _exists(code, page):
            yield code
        if _DIRECTORY.fullmatch(code) and not _exists(code, page):
            quoted = re.search(rf"[\"'/{{}}]{re.escape(code.rstrip('/'))}[\"'/]", programs)
            if not quoted:
                yield code


def unknown_keys(page: Path) -> Iterator[str]:
    """Keys that the configuration does not have."""
    for code in _codes(page):
        found = _KEY.fullmatch(code)
        is_file = _FILE.fullmatch(code) or _WRITTEN.fullmatch(code)  # evaluation.jsonl
        if found and not is_file and not is_key(found[1] + found[2]):
            yield code


def unknown_names(page: Path) -> Iterator[str]:
    """Classes, functions and fields (words with an underscore or a capital) that no code has."""
    for code in _codes(page):
        if not _NAME.fullmatch(code) or _FILE.fullmatch(code) or _KEY.fullmatch(code):
            continue
        parts = [part for part in code.split(".") if re.search(r"_|[a-z][A-Z]|^[A-Z][a-z]", part)]
        owner, _, member = code.partition(".")
        if owner in _classes() and member:
            if not re.search(rf"\b{member}\b", _classes()[owner]):
                yield code
            continue
        known = _words() | megatron_fields() | _ELSEWHERE
        yield from (part for part in parts if part not in known)


RULES = (broken_links, missing_files, never_written, unknown_keys, unknown_names)


def _codes(page: Path) -> Iterator[str]:
    """Inline code; placeholders such as OUTPUT/x are not names of anything."""
    for code in inline_code(page):
        if not re.search(r"(^|/)[A-Z_]{3,}(/|$|\.)", code) or (ROOT / code).exists():
            yield code


def _exists(code: str, page: Path) -> bool:
    """From the page, the root, the package, or Megatron; a bare name anywhere in the project."""
    roots = (page.parent, ROOT, ROOT / "moiie_megatron", megatron_core().parents[1])
    if any((root / code).exists() for root in roots):
        return True
    return "/" not in code and code in _file_names()


@cache
def _file_names() -> frozenset[str]:
    return frozenset(path.name for folder in SOURCES for path in (ROOT / folder).rglob("*.*"))


@cache
def _text(*directories: str) -> str:
    """The sources below some directories; those of these tests name things that do not exist."""
    paths = [p for d in directories for p in sorted((ROOT / d).rglob("*.*"))]
    paths = [p for p in paths if p.suffix in (".py", ".sh") and p.parent != Path(__file__).parent]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


@cache
def _words() -> frozenset[str]:
    return frozenset(re.findall(r"\w+", _text(*SOURCES)))


@cache
def _classes() -> dict[str, str]:
    """Classes of the package, each with the source of its file."""
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "moiie_megatron").rglob("*.py")]
    return {found: s for s in sources for found in re.findall(r"^class (\w+)", s, re.MULTILINE)}
