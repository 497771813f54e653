"""docs/megatron-section.md is what the tables say."""

from __future__ import annotations

from moiie_megatron.config.megatron_section.reference import render
from tests.helpers.launch import ROOT


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "megatron-section.md").read_text(encoding="utf-8")
    command = "python -m moiie_megatron.config.megatron_section.reference"
    assert page == render(), f"run: {command} > docs/megatron-section.md"
