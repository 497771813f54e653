"""The design rules that a reader relies on, kept by a test instead of by good intentions."""

from __future__ import annotations

import ast
import functools
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "moiie_megatron"
OUTSIDE = ("tools", "examples", "tests", "benchmarks")
SERVING = "serving"  # a distribution of its own
MAX_LINES = 400
MAX_MODULES = 15  # in a folder of the package, without __init__.py

# A file imports its own folder or folders of an earlier row, never its row or a later one.
LEVELS = (
    ("utils",),
    ("layout",),
    ("config",),
    ("families",),
    ("mcore",),
    ("routing_stats",),
    ("moe", "data"),
    ("vlm", "hf", "planning"),
    ("checkpoint",),
    ("convert",),
    ("training", "generation", "exported"),
    ("evaluation", "analysis"),
    ("selftest", "chat", "simulation"),
    ("cli",),
)
LEVEL = {folder: level for level, row in enumerate(LEVELS) for folder in row}
WITHOUT_TORCH = ("config", "layout", "families", "planning")


def _python_files(*folders: str) -> list[Path]:
    """Files by path from the root; hidden folders (editors, environments) are not ours."""
    return sorted(
        path
        for folder in folders
        for path in (file.relative_to(ROOT) for file in (ROOT / folder).rglob("*.py"))
        if not any(part.startswith(".") for part in path.parts)
    )


@functools.cache
def _imports(path: Path, source: str) -> list[str]:
    """Full names of the modules that a file imports anywhere in it; ``from a import b`` gives
    ``a.b``, whether b is a module or not."""
    names = []
    package = path.parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def _wrong_imports(path: Path, source: str) -> list[str]:
    """Imports of a file of the package, or of the folders outside it, against the rule."""
    inside = path.parts[0] == PACKAGE
    folder = path.parts[1] if inside and len(path.parts) > 2 else None
    wrong = []
    for name in _imports(path, source):
        top, *rest = name.split(".")
        if top in OUTSIDE:
            # Folders outside the package may use their own helpers only.
            allowed = top == path.parts[0]
        elif inside and top == PACKAGE:
            target = rest[0] if rest else None
            allowed = folder == target or (
                folder is not None
                and (target not in LEVEL or LEVEL[target] < LEVEL.get(folder, -1))
            )
        else:
            allowed = True
        if not allowed:
            wrong.append(name)
    return wrong


def test_the_tree_is_found() -> None:
    """The rules below would hold for no files at all."""
    assert Path("moiie_megatron/config/schema.py") in _python_files(PACKAGE)
    assert Path("tests/design/test_rules.py") in _python_files(*OUTSIDE)


def test_files_are_short() -> None:
    lengths = {
        str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines())
        for path in _python_files(PACKAGE, *OUTSIDE, SERVING)
    }
    assert {path: n for path, n in lengths.items() if n > MAX_LINES} == {}


def test_folders_are_small() -> None:
    counts = Counter(path.parent for path in _python_files(PACKAGE) if path.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > MAX_MODULES} == {}


def test_files_are_ascii() -> None:
    files = _python_files(PACKAGE, *OUTSIDE, SERVING)
    assert [str(path) for path in files if not (ROOT / path).read_bytes().isascii()] == []


def test_the_plugin_for_vllm_needs_nothing_of_this_project() -> None:
    files = _python_files(f"{SERVING}/moiie_vllm")
    names = {
        name.partition(".")[0]
        for path in files
        for name in _imports(path, (ROOT / path).read_text(encoding="utf-8"))
    }
    assert {"vllm", "moiie_vllm"} <= names
    assert names & {PACKAGE, "megatron", *OUTSIDE} == set()


def test_every_folder_has_a_level() -> None:
    folders = {path.parts[1] for path in _python_files(PACKAGE) if len(path.parts) > 2}
    assert folders <= set(LEVEL)


def test_imports_point_down() -> None:
    wrong = {
        str(path): names
        for path in _python_files(PACKAGE, *OUTSIDE)
        if (names := _wrong_imports(path, (ROOT / path).read_text(encoding="utf-8")))
    }
    assert wrong == {}


def _cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A circle in a graph of modules, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_modules_import_each_other_in_no_circle() -> None:
    """Inside folders too, and where the import is for type checkers alone."""
    files = {".".join(p.with_suffix("").parts): p for p in _python_files(PACKAGE)}
    graph = {
        module: {
            target
            for name in _imports(path, (ROOT / path).read_text(encoding="utf-8"))
            for target in (name, name.rpartition(".")[0])
            if target in files and target != module
        }
        for module, path in files.items()
    }
    assert len(graph) > 100
    assert _cycle(graph) == []


def test_the_circle_rule_itself() -> None:
    assert _cycle({"a": ["b"], "b": ["c"], "c": []}) == []
    assert set(_cycle({"a": ["b"], "b": ["c"], "c": ["a"], "d": []})) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("moiie_megatron/moe/a.py", "import moiie_megatron.config.load", []),
        ("moiie_megatron/moe/a.py", "from moiie_megatron.moe import router", []),
        ("moiie_megatron/moe/a.py", "from .router import x\nfrom ..mcore.device import y", []),
        ("moiie_megatron/moe/a.py", "from moiie_megatron import __version__", []),
        ("moiie_megatron/config/a.py", "from moiie_megatron.layout.experts import x", []),
        ("tools/train.py", "from moiie_megatron.training.loop import train", []),
        ("tests/unit/test_a.py", "from tests.helpers import x\nimport torch", []),
        (
            "moiie_megatron/moe/a.py",
            "import moiie_megatron.vlm.merge as m",
            ["moiie_megatron.vlm.merge"],
        ),
        (
            "moiie_megatron/moe/a.py",
            "from moiie_megatron.data import record",
            ["moiie_megatron.data.record"],
        ),
        (
            "moiie_megatron/moe/a.py",
            "def f():\n    from moiie_megatron import training",
            ["moiie_megatron.training"],
        ),
        (
            "moiie_megatron/layout/a.py",
            "from ..config import load",
            ["moiie_megatron.config.load"],
        ),
        (
            "moiie_megatron/__init__.py",
            "from moiie_megatron.config.load import load_config",
            ["moiie_megatron.config.load.load_config"],
        ),
        (
            "moiie_megatron/training/a.py",
            "from tools.train import main",
            ["tools.train.main"],
        ),
        ("tools/train.py", "from tests.helpers import x", ["tests.helpers.x"]),
        ("benchmarks/a.py", "import tools.train", ["tools.train"]),
    ],
)
def test_the_import_rule_itself(path: str, source: str, wrong: list[str]) -> None:
    assert _wrong_imports(Path(path), source) == wrong


def test_tests_share_helpers_not_test_modules() -> None:
    """What two test modules need lies beside them or in ``tests/helpers``, and fixtures in a
    conftest, which pytest finds by itself."""
    wrong = {
        str(path): name
        for path in _python_files("tests")
        for name in _imports(path, (ROOT / path).read_text(encoding="utf-8"))
        for part in name.split(".")[:-1]
        if name.startswith("tests.") and (part.startswith("test_") or part == "conftest")
    }
    assert wrong == {}


def test_unit_tests_mirror_the_package() -> None:
    """``tests/unit/PATH/test_X.py`` is about ``moiie_megatron/PATH``."""
    folders = {path.relative_to("tests/unit").parent for path in _python_files("tests/unit")}
    assert len(folders) > 10
    assert {str(f) for f in folders if not (ROOT / PACKAGE / f).is_dir()} <= {"helpers"}


def test_megatron_has_what_is_imported() -> None:
    """Also inside functions: some are called only where there is a GPU."""
    missing = []
    for path in _python_files(PACKAGE, *OUTSIDE):
        for name in _imports(path, (ROOT / path).read_text(encoding="utf-8")):
            module, _, attribute = name.rpartition(".")
            if not name.startswith("megatron.core."):
                continue
            if importlib.util.find_spec(name if module == "megatron" else module) is None or not (
                hasattr(importlib.import_module(module), attribute)
                or importlib.util.find_spec(name)
            ):
                missing.append(f"{path}: {name}")
    assert missing == []


@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_runs_without_torch(folder: str) -> None:
    """A configuration can be checked and planned on a machine that has no torch."""
    modules = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in _python_files(f"{PACKAGE}/{folder}")
    ]
    assert len(modules) > 1
    program = (
        f"import importlib, sys\nfor name in {modules}:\n    importlib.import_module(name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
