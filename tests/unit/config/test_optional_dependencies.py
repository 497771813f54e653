"""A missing optional package is named before a run starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from moiie_megatron.config.optional_dependencies import check_extras
from tests.helpers.user_errors import user_error
from tests.unit.config.minimal import load_minimal


def test_wandb_is_only_needed_where_a_project_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_minimal(tmp_path)
    named = load_minimal(tmp_path, ["log.wandb_project=pictures"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_extras(plain)
    with user_error("log.wandb_project", "'pictures'", "wandb"):
        check_extras(named)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_extras(named)


def test_flex_is_asked_for_its_package_by_a_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration can be read where the package is not: for a report, say."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_minimal(tmp_path, ["moe.dispatcher=flex"])
    with user_error("moe.dispatcher", "flex", "deep_ep"):
        check_extras(config)
