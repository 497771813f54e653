"""What the build of the image judges: versions are invented, no image is needed."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.helpers.launch import ROOT, run

DOCKERFILE = ROOT / "docker" / "Dockerfile"
# As the metadata of 0.16.1 has it; that of later versions names no range.
DECLARED = ["numpy", 'transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"']
OPEN = ["numpy", 'transformer-engine[core_cu13,pytorch]; extra == "te"']


@pytest.fixture(scope="module")
def check_image() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_image", ROOT / "docker/check_image.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("core", "requirements", "engine"),
    [
        ("0.16.1", DECLARED, "2.9.0"),
        ("0.16.1", DECLARED, "2.11.0+c3d2f1"),
        ("0.17.1", OPEN, "2.12.0+5671fd36"),
        ("0.17.0", OPEN, "2.12.0.dev0+5671fd36"),
        ("0.18.2", OPEN, "2.16.0"),
        ("0.19.2", OPEN, "2.18.0"),
    ],
)
def test_pairs_that_belong_together(
    check_image: ModuleType, core: str, requirements: list[str], engine: str
) -> None:
    assert check_image.problem(core, requirements, engine) is None


@pytest.mark.parametrize(
    ("core", "requirements", "engine", "words"),
    [
        ("0.16.1", DECLARED, "2.12.0", ["0.16.1", ">=2.9.0a0", "<2.12.0", "2.12.0"]),
        ("0.17.1", OPEN, "2.9.0", ["0.17.1", ">=2.12", "2.9.0", "BASE and CORE"]),
        ("0.19.2", OPEN, "2.12.0", ["0.19.2", ">=2.17", "2.12.0"]),
        ("0.17.1", OPEN, None, ["no Transformer Engine", "BASE"]),
        ("0.20.0", OPEN, "2.19.0", ["Nothing says", "0.20.0"]),
    ],
)
def test_pairs_that_do_not(
    check_image: ModuleType,
    core: str,
    requirements: list[str],
    engine: str | None,
    words: list[str],
) -> None:
    reason = check_image.problem(core, requirements, engine)
    assert reason.endswith(".") and all(word in reason for word in words)


def test_the_declared_range_comes_first(check_image: ModuleType) -> None:
    declared = ['transformer_engine>=3; extra == "te"']
    assert check_image.engine_range("0.17.1", declared) == ">=3"


def test_every_accepted_megatron_core_has_a_range(check_image: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (core,) = (
        one
        for text in project["dependencies"]
        if (one := Requirement(text)).name == "megatron-core"
    )
    minors = {f"0.{minor}" for minor in range(10, 40) if f"0.{minor}.99" in core.specifier}
    assert minors == {"0.16", *check_image.RELEASED_WITH}
    (shipped,) = re.findall(r"^ARG CORE=(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert shipped in core.specifier and check_image.engine_range(shipped, OPEN)


def test_a_replaced_part_is_named(check_image: ModuleType) -> None:
    torch = check_image.version("torch")
    assert check_image.replaced([f"torch=={torch}"]) is None
    assert "the base had 1.0" in check_image.replaced([f"torch=={torch}", "numpy==1.0"])
    assert "no torch" in check_image.replaced([f"numpy=={check_image.version('numpy')}"])


@pytest.mark.slow
def test_the_versions_are_listed_without_a_gpu(check_image: ModuleType, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"torch=={check_image.version('torch')}\n")
    program = [sys.executable, "docker/check_image.py", str(constraints)]
    listed = run([*program, "--cpu"], timeout=120).check().stdout
    assert re.search(rf"^Megatron-Core +{check_image.version('megatron-core')}$", listed, re.M)
    assert re.search("^deep_ep +absent: moe.dispatcher=flex", listed, re.M)
    refused = run(program, timeout=120)
    assert refused.code == 1 and "has no CUDA" in refused.stderr
