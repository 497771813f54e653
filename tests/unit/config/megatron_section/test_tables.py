"""The tables of the three sections that set fields of Megatron-Core."""

from __future__ import annotations

import pytest

from moiie_megatron.config.megatron_section.sections import MEGATRON, SECTIONS
from moiie_megatron.config.megatron_section.table import MegatronSection
from moiie_megatron.config.schema import RunConfig

each_section = pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.key)


@each_section
def test_a_name_is_in_one_table(section: MegatronSection) -> None:
    """Where a pattern matches too, the table that is asked first decides."""
    assert set(section.allowed) & set(section.owned) == set()
    names = [name for refused in section.refused for name in refused.names]
    assert len(set(names)) == len(names)
    plain = {name for name in names if "*" not in name}
    assert plain & (set(section.allowed) | set(section.owned)) == set()


def test_a_pattern_does_not_hide_a_name() -> None:
    assert MEGATRON.classify("moe_router_topk") == "moe.top_k"


@each_section
def test_reasons_make_a_sentence(section: MegatronSection) -> None:
    for refused in section.refused:
        for text in (refused.reason, refused.instead):
            assert (
                text[0].islower()
                or text.split()[0].strip("0123456789,").isupper()
                or (text.split()[0] in ("CUDA", "Megatron-Core"))
            )
            assert not text.endswith(".") and ": " not in text


@each_section
def test_owners_are_keys(section: MegatronSection) -> None:
    """Or fields of another of the sections."""
    for owner in section.owned.values():
        model: type = RunConfig
        *parents, name = owner.split(".")
        if parents in (["megatron"], ["ddp"]):
            assert any(name in s.allowed for s in SECTIONS if s.key == parents[0])
            continue
        for parent in parents:
            model = model.model_fields[parent].annotation  # type: ignore[attr-defined]
        assert name in model.model_fields, owner  # type: ignore[attr-defined]
