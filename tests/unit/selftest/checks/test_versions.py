"""Versions against the accepted ranges, and the table of GPUs."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from moiie_megatron.selftest.checks.versions import check_versions, requirements, wrong_versions
from tests.unit.selftest.sessions import session


def test_the_tests_run_with_accepted_versions() -> None:
    found = check_versions(session())
    assert found.status == "PASS", found.reason
    assert found.figures["packages"]["torch"] == metadata.version("torch")
    assert len(found.figures["packages"]) == len(requirements()) > 10


@pytest.mark.parametrize(
    ("requirement", "installed", "problem"),
    [
        ("torch>=2.10", "2.10.0a0+b558c98", None),  # as NVIDIA's images name their builds
        ("torch>=2.10", "2.9.1", "torch is 2.9.1, not >=2.10"),
        ("torch>=2.10,<3", "3.0", "torch is 3.0, not <3,>=2.10"),
        ("no-such-package>=1", None, "no-such-package is not installed"),
    ],
)
def test_ranges(
    requirement: str, installed: str | None, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed is not None:
        monkeypatch.setattr(metadata, "version", lambda name: installed)
    assert list(wrong_versions([Requirement(requirement)])) == ([problem] if problem else [])


def test_ranges_of_sources_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_found)
    text = (Path(__file__).parents[4] / "pyproject.toml").read_text()
    assert all(f'"{requirement.name}' in text for requirement in requirements())
