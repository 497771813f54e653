"""Every patch of Megatron-Core and torch: its target exists, and it is still needed."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
import torch

from moiie_megatron.mcore.patches.patch import Patch
from moiie_megatron.mcore.patches.registry import PATCHES
from tests.helpers.launch import ROOT, environment

UNPATCHED = "tests/unit/mcore/patches/unpatched.py"
VERSION = megatron.core.__version__
TARGETS = [
    (patch, target) for patch in PATCHES if patch.is_needed_in(VERSION) for target in patch.targets
]


def find(name: str) -> object:
    """The object of a dotted name: as many parts as possible are modules.

    Raises:
        AttributeError: There is none.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


@pytest.mark.parametrize(("patch", "target"), TARGETS, ids=[target for _, target in TARGETS])
def test_the_target_exists(patch: Patch, target: str) -> None:
    find(target.rpartition(".")[0] if patch.creates else target)


def test_a_target_that_is_gone_is_noticed() -> None:
    with pytest.raises(AttributeError):
        find("megatron.core.models.gpt.gpt_model.GPTModel._renamed")


def test_names_are_unique_and_reasons_are_given() -> None:
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    assert all(patch.targets and patch.reason and patch.versions for patch in PATCHES)


def test_versions_that_need_a_patch() -> None:
    """A version that nobody has examined is assumed to need everything."""
    patch = Patch("a", ("torch",), "because", versions=("0.16",))
    needed = {version: patch.is_needed_in(version) for version in ("0.16.1", "0.19.2", "0.20.0")}
    assert needed == {"0.16.1": True, "0.19.2": False, "0.20.0": True}


@pytest.mark.skipif(torch.version.cuda is not None, reason="what a CPU build of torch refuses")
def test_every_patch_is_still_needed() -> None:
    """In a process without patches; the registry says where need cannot be shown."""
    result = subprocess.run(
        [sys.executable, UNPATCHED],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {}


def test_every_patch_has_a_check_or_says_why_not() -> None:
    tree = ast.parse((ROOT / UNPATCHED).read_text(encoding="utf-8"))
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "CHECKS"
    )
    checked = set(ast.literal_eval(ast.List(table.keys)))
    assert checked == {patch.name for patch in PATCHES if not patch.need_not_shown}


def test_private_names_are_declared() -> None:
    """Names with an underscore that the package imports from Megatron-Core or torch."""
    declared = {target for patch in PATCHES for target in patch.targets}
    imported = {
        f"{node.module}.{alias.name}"
        for path in Path(ROOT / "moiie_megatron").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert imported and imported <= declared


LIBRARIES = ("megatron", "torch", "transformers")
