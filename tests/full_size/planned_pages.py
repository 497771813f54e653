"""Plans in the documentation: write them anew with ``python -m tests.full_size.planned_pages``."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tests.helpers.launch import ROOT

PAGES: Final = tuple(ROOT / "docs" / name for name in ("train-llama3-8b.md", "train-phi3.md"))
_BLOCK: Final = re.compile(r"(<!-- plan: (.*?) -->\n)(.*?)(<!-- end of plan -->)", re.DOTALL)


class PlanBlock(NamedTuple):
    """A plan in a page.

    Attributes:
        command: Arguments of ``tools/plan.py``.
        text: What stands behind them.
    """

    page: Path
    command: str
    text: str


def plan_blocks() -> Iterator[PlanBlock]:
    for page in PAGES:
        for found in _BLOCK.finditer(page.read_text()):
            yield PlanBlock(page, found[2], found[3])


def planned(command: str) -> str:
    """What stands behind a command: the output of the planner."""
    words = [sys.executable, str(ROOT / "tools/plan.py"), *command.split()]
    output = subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout
    return f"\n```text\n{output}```\n\n"


def main() -> None:
    for page in PAGES:
        text = _BLOCK.sub(lambda found: found[1] + planned(found[2]) + found[4], page.read_text())
        page.write_text(text)


if __name__ == "__main__":
    main()
