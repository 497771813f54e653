"""Size and words of the pages; generated parts are what their generators make."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from moiie_megatron import __version__
from moiie_megatron.config.megatron_section.sections import MEGATRON
from moiie_megatron.config.megatron_section.table import Refused
from moiie_megatron.config.renamed_keys import RENAMED
from tests.docs.doc_pages import PAGES, ROOT, blocks, megatron_core, name

README_LINES = 160
CLIENTS = {"openai"}  # what a reader runs in an environment of their own
# Paths of one machine, and words of a tool that was never part of the project.
FORBIDDEN = re.compile(r"/work/|/home/|/root/|\bTODO\b|\bFIXME\b")


def test_the_pages_are_found() -> None:
    found = {name(page) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"} <= found
    assert "docker/README.md" in found


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_are_ascii_and_name_no_machine(page: Path) -> None:
    assert page.read_bytes().isascii()
    assert FORBIDDEN.findall(page.read_text()) == []


def test_every_page_of_the_documentation_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"(docs/{p.name})" not in readme] == []


def test_the_figure_is_what_its_script_draws() -> None:
    path = ROOT / "docs/figures/data_flow.py"
    spec = importlib.util.spec_from_file_location("data_flow", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert path.with_suffix(".svg").read_text() == script.picture()


def test_the_figure_names_files_that_exist() -> None:
    text = (ROOT / "docs/figures/data_flow.svg").read_text()
    files = re.findall(r"[\w/]+\.py|[\w/]+/(?=[,<])", text)
    assert len(files) > 12
    roots = (ROOT / "moiie_megatron", ROOT / "moiie_megatron/moe", megatron_core())
    assert [f for f in files if not any((root / f).exists() for root in roots)] == []


def test_the_changelog_lists_every_renamed_key() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text
    assert [key for pair in RENAMED.items() for key in pair if key not in text] == []


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2508.09779"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_of_data_can_be_read(page: Path) -> None:
    for block in blocks(page, "json"):
        json.loads(block)
    for block in blocks(page, "yaml"):
        yaml.safe_load(block)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        nodes = [n for n in ast.walk(ast.parse(block)) if isinstance(n, ast.ImportFrom)]
        wrong = [
            f"{node.module}.{alias.name}"
            for node in nodes
            for alias in node.names
            if not _has_name(node.module or "", alias.name)
        ]
        assert wrong == []


def _has_name(module: str, attribute: str) -> bool:
    """Whether the source of a module of ours or Megatron's has a name; nothing is imported."""
    roots = {"moiie_megatron": ROOT, "megatron": megatron_core().parents[1]}
    top = module.partition(".")[0]
    if top in CLIENTS:
        return True
    if top not in roots:
        return importlib.util.find_spec(top) is not None
    path = roots[top] / module.replace(".", "/")
    if (path / f"{attribute}.py").is_file():
        return True
    files = [path.with_suffix(".py"), path / "__init__.py"]
    return any(
        re.search(rf"\b{attribute}\b", file.read_text(encoding="utf-8"))
        for file in files
        if file.is_file()
    )


def test_every_patch_is_described() -> None:
    page = (ROOT / "docs/cpu.md").read_text()
    sources = (ROOT / "moiie_megatron/mcore/patches").glob("*.py")
    names = [
        next(ast.literal_eval(kw.value) for kw in node.keywords if kw.arg == "name")
        for source in sources
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Patch"
    ]
    assert len(names) > 20
    assert [name for name in names if name not in " ".join(page.split())] == []


def test_the_levels_of_packages_are_those_of_the_rule() -> None:
    rules = ast.parse((ROOT / "tests/design/test_rules.py").read_text(encoding="utf-8"))
    (levels,) = (
        ast.literal_eval(node.value)
        for node in rules.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEVELS"
    )
    page = (ROOT / "docs/architecture.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.MULTILINE))
    found = [sorted(re.findall(r"(\w+)/", rows[str(level)])) for level in range(len(rows))]
    assert found == [sorted(row) for row in levels]


def test_what_the_status_page_calls_refused_is_refused() -> None:
    text = (ROOT / "docs/status.md").read_text()
    (table,) = re.findall(r"## Not supported\n\n(.*?)\n\n", text, re.DOTALL)
    names = re.findall(r"`megatron\.(\w+)\*?`", table)
    assert len(names) > 10
    kinds = {name: MEGATRON.classify(f"{name}x" if name.endswith("_") else name) for name in names}
    assert [name for name, kind in kinds.items() if not isinstance(kind, Refused | str)] == []
