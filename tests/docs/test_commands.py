"""Commands on the pages can be typed: programs, subcommands, options, files and overrides exist."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.docs.markdown import PAGES, ROOT, Command, commands
from tests.docs.schema_keys import is_key

COMMANDS = sorted({str(c): c for page in PAGES for c in commands(page)}.items())
_OVERRIDE = re.compile(r"([a-z_]+(?:\.[a-z_0-9]+)*)=")
_OURS = re.compile(r"(tools|examples|benchmarks|docs|docker|tests)/[\w./\-]+")
_SCRIPT = re.compile(r"(tools|benchmarks|docs/figures|examples)/[\w\-]+\.(py|sh)")


def _made() -> list[object]:
    return [pytest.param(command, id=text) for text, command in COMMANDS]


def test_commands_are_found() -> None:
    programs = {command.words[0] for _, command in COMMANDS}
    assert {"make", "python", "torchrun", "bash"} <= programs
    assert sum(any("convert.py" in w for w in command.words) for _, command in COMMANDS) > 6


@pytest.mark.parametrize("command", _made())
def test_files_of_a_command_exist(command: Command) -> None:
    words = [word.rpartition("=")[2] for word in command.words]
    assert [w for w in words if _OURS.fullmatch(w) and not (ROOT / w).exists()] == []


@pytest.mark.parametrize("command", _made())
def test_targets_of_make_exist(command: Command) -> None:
    if command.words[0] != "make":
        return
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(command.words[1:]) <= set(targets)


@pytest.mark.parametrize("command", _made())
def test_overrides_are_keys_of_the_configuration(command: Command) -> None:
    place = _script_at(command)
    if place is None:
        return
    overrides = [_OVERRIDE.match(word) for word in command.words[place + 1 :]]
    assert [found[1] for found in overrides if found and not is_key(found[1])] == []


@pytest.mark.parametrize("command", _made())
def test_options_are_those_of_the_program(command: Command) -> None:
    place = _script_at(command)
    if place is None or not command.words[place].endswith(".py"):
        return
    script, words = command.words[place], command.words[place + 1 :]
    help_text = help_of(script)
    choices = re.search(r"\{([\w,]+)\}", help_text.partition("positional")[0])
    subcommands = choices[1].split(",") if choices and choices[1].count(",") else []
    if subcommands and words and words[0] in subcommands:
        help_text = help_of(script, words[0])
    elif re.search(r"^\s+\{[\w,]+\}", help_text, re.MULTILINE):
        assert words[:1] in ([], ["--help"]), f"{script} has no command {words[0]}"
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    known = set(re.findall(r"--[\w-]+", help_text))
    assert [option for option in options if option not in known] == []


def _script_at(command: Command) -> int | None:
    """Where a script of the project stands in a command."""
    for place, word in enumerate(command.words):
        if _SCRIPT.fullmatch(word):
            return place
    return None


@cache
def help_of(script: str, *words: str) -> str:
    """What a program prints with ``--help``; called in this process, which has imported torch."""
    path = ROOT / script
    spec = importlib.util.spec_from_file_location(f"documented_{Path(script).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    arguments, search = sys.argv, list(sys.path)
    sys.argv, printed = [script, *words, "--help"], io.StringIO()
    sys.path.insert(0, str(path.parent))  # as for a script: benchmarks share a helper
    try:
        spec.loader.exec_module(module)
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            module.main()
    finally:
        sys.argv, sys.path[:] = arguments, search
    return printed.getvalue()
