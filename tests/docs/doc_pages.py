"""What the tests of the documentation look at: the pages, their links, code and commands."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FOLDERS = ("docs/**", "docker", "examples/**", "serving", "tests/**")
PAGES = sorted(path for folder in (".", *_FOLDERS) for path in ROOT.glob(f"{folder}/*.md"))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_INPUT = re.compile(r"<<'(\w+)'\n.*?^\1$", re.MULTILINE | re.DOTALL)  # a here document
_ASSIGNMENT = re.compile(r"^[A-Z_0-9]+=")


@dataclass(frozen=True)
class Command:
    """One command of a page: the program and its arguments, without variables in front."""

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{name(self.page)}: {' '.join(self.words)}"


def megatron_core() -> Path:
    """The directory of the installed Megatron-Core; importing it would take seconds."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def name(page: Path) -> str:
    """The path of a page from the root."""
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [content for kind, content in found if kind == language]


def inline_code(page: Path) -> list[str]:
    """What stands between single back quotes outside fenced blocks."""
    return _CODE.findall(prose(page))


def links(page: Path) -> list[str]:
    """Targets of links and images, as they are written."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def commands(page: Path) -> Iterator[Command]:
    """The commands of the bash blocks and of inline code that starts with a known program."""
    for block in blocks(page, "bash"):
        block = _INPUT.sub("", block)
        for line in block.replace("\\\n", " ").splitlines():
            yield from _commands(page, line)
    for code in inline_code(page):
        if code.split()[0] in ("make", "python", "bash", "torchrun"):
            yield from _commands(page, code)


def _commands(page: Path, line: str) -> Iterator[Command]:
    words = shlex.split(line, comments=True)
    while words and (_ASSIGNMENT.match(words[0]) or words[0] == "export"):
        words = words[1:]
    if words:
        yield Command(page, tuple(words))
