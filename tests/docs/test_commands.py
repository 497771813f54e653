"""Commands on the pages can be typed: programs, subcommands, options, files and overrides exist."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.docs.doc_pages import PAGES, ROOT, Command, commands, name
from tests.docs.schema_keys import is_key

_OVERRIDE = re.compile(r"([a-z_]+(?:\.[a-z_0-9]+)*)=")
_OURS = re.compile(r"(tools|examples|benchmarks|docs|docker|tests)/[\w./\-]+")
_SCRIPT = re.compile(r"(tools|benchmarks|docs/figures|examples)/[\w\-]+\.(py|sh)")


def test_commands_are_found() -> None:
    found = [command for page in PAGES for command in commands(page)]
    assert {"make", "python", "torchrun", "bash"} <= {command.words[0] for command in found}
    assert sum("tools/convert.py" in command.words for command in found) > 6


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_can_be_typed(page: Path) -> None:
    assert [why for command in commands(page) for why in problems(command)] == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make tea", "no target tea"),
        ("python tools/trane.py CONFIG.yaml", "no file tools/trane.py"),
        ("python tools/train.py examples/configs/no.yaml", "no file examples/configs/no.yaml"),
        ("torchrun tools/train.py C.yaml train.setps=3", "no key train.setps"),
        ("python tools/convert.py exprot --ckpt C", "no subcommand exprot"),
        ("python tools/convert.py export --force --tp 2", "no option --tp"),
        ("bash examples/train_ablation.sh phi3 vanilla moe.top=1", "no key moe.top"),
        ("python benchmarks/layer.py --no-such", "no option --no-such"),
    ],
)
def test_the_rule_itself(line: str, problem: str) -> None:
    found = problems(Command(ROOT / "README.md", tuple(line.split())))
    assert len(found) == 1
    assert problem in found[0]


def problems(command: Command) -> list[str]:
    """What is wrong with a command, one sentence each."""
    return [f"{command}: {problem}" for problem in _problems(command)]


def _problems(command: Command) -> Iterator[str]:
    words = command.words
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        yield from (
            f"no target {word}" for word in words[1:] if word not in targets and "=" not in word
        )
    files = [word.rpartition("=")[2] for word in words]
    missing = [file for file in files if _OURS.fullmatch(file) and not (ROOT / file).exists()]
    yield from (f"no file {file}" for file in missing)
    place = next((i for i, word in enumerate(words) if _SCRIPT.fullmatch(word)), None)
    if place is None or words[place] in missing:
        return
    script, arguments = words[place], words[place + 1 :]
    for found in filter(None, map(_OVERRIDE.match, arguments)):
        if not is_key(found[1]):
            yield f"no key {found[1]}"
    if script.endswith(".py"):
        yield from _wrong_options(script, arguments)


def _wrong_options(script: str, arguments: tuple[str, ...]) -> Iterator[str]:
    text = help_of(script)
    subcommands = re.search(r"^  \{([\w,]+)\}", text, re.MULTILINE)
    if subcommands and arguments:
        if arguments[0] not in subcommands[1].split(","):
            yield f"no subcommand {arguments[0]}"
            return
        text = help_of(script, arguments[0])
    known = set(re.findall(r"--[\w-]+", text))
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    yield from (f"no option {option}" for option in options if option not in known)


@cache
def help_of(script: str, *words: str) -> str:
    """What a program prints with ``--help``, called in this process; of a benchmark, which imports
    Megatron first, its source instead."""
    path = ROOT / script
    if script.startswith("benchmarks/"):
        return path.read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"documented_{Path(script).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    arguments = sys.argv
    sys.argv, printed = [script, *words, "--help"], io.StringIO()
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            module.main()
    finally:
        del sys.modules[spec.name]
        sys.argv = arguments
    return printed.getvalue()
