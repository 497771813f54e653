"""docs/configuration.md is what the schema says, and every key is explained."""

from __future__ import annotations

from moiie_megatron.config.reference import render
from moiie_megatron.config.schema import RunConfig
from tests.helpers.launch import ROOT


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == render(), (
        "run: python -m moiie_megatron.config.reference > docs/configuration.md"
    )


def test_every_key_has_a_description() -> None:
    schema = RunConfig.model_json_schema()
    sections = {"": schema, **schema["$defs"]}
    missing = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, node in section.get("properties", {}).items()
        if not node.get("description") and "$ref" not in node
    ]
    assert not missing
