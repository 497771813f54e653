"""Which releases of transformers an export accepts, and that it says so before anything else."""

from __future__ import annotations

import importlib
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement

from moiie_megatron.hf.auto_files import REMOTE_FILES, write_remote_code
from moiie_megatron.hf.version_moiie import NEWEST, OLDEST, check_version


@pytest.mark.parametrize("version", [f"{OLDEST}.0", f"{NEWEST}.0", f"{NEWEST}.3", f"{NEWEST}+cpu"])
def test_tested_versions_pass(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version(version)


@pytest.mark.parametrize("version", ["4.57.6", "5.9.0", "5.18.1", f"{OLDEST}.0.dev0"])
def test_older_versions_are_refused(version: str) -> None:
    with pytest.raises(ImportError, match=f"transformers {version} .* {OLDEST} to {NEWEST}"):
        check_version(version)


@pytest.mark.parametrize("version", [f"5.{NEWEST.minor + 1}.0", "5.100.0", "6.0", f"{NEWEST}.dev0"])
def test_untested_versions_warn(version: str) -> None:
    with pytest.warns(UserWarning, match=f"{OLDEST} to {NEWEST}, but {version} is installed"):
        check_version(version)


def test_the_package_accepts_the_versions_of_its_exports() -> None:
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    lines = tomllib.loads(pyproject.read_text("utf-8"))["project"]["dependencies"]
    (accepted,) = [r.specifier for r in map(Requirement, lines) if r.name == "transformers"]
    assert str(OLDEST) in accepted and f"{NEWEST}.9" in accepted
    assert f"5.{OLDEST.minor - 1}.9" not in accepted and f"5.{NEWEST.minor + 1}" not in accepted


@pytest.mark.parametrize("file", REMOTE_FILES)
def test_the_version_is_checked_before_newer_names_are_imported(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an old version would fail with a name that it lacks."""
    package = tmp_path / f"old_{Path(file).stem}"
    package.mkdir()
    write_remote_code(package)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(transformers, "__version__", "5.15.0")
    for module, name in (
        ("transformers.conversion_mapping", "register_checkpoint_conversion_mapping"),
        ("transformers.utils.output_capturing", "OutputRecorder"),
    ):
        monkeypatch.delattr(sys.modules[module], name)
    with pytest.raises(ImportError, match=r"transformers 5\.15\.0 is too old"):
        importlib.import_module(f"{package.name}.{Path(file).stem}")
