"""``docs/adding-a-family.md`` shows the code that is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_is_the_file() -> None:
    example, registration = _blocks()
    family = (ROOT / "moiie_megatron/families/language/qwen3.py").read_text(encoding="utf-8")
    assert family.endswith(example)
    registry = (ROOT / "moiie_megatron/config/families.py").read_text(encoding="utf-8")
    lines = [line for line in registration.splitlines() if "# ..." not in line]
    assert len(lines) == 4 and all(line in registry.splitlines() for line in lines)


def test_what_it_names_exists() -> None:
    fields = re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE)
    names = {name for field in fields for name in re.findall(r"`(\w+)`", field)}
    definition = (ROOT / "moiie_megatron/families/family.py").read_text(encoding="utf-8")
    assert len(names) > 10
    assert [name for name in sorted(names) if f"    {name}: " not in definition] == []
    paths = set(re.findall(r"`((?:moiie_megatron|tests|docs|tools)/[\w./-]+)`", PAGE))
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
