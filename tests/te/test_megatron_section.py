"""Fields of the ``megatron`` section with Transformer Engine's modules."""

from __future__ import annotations

import pytest
from torch import Tensor

from moiie_megatron.mcore.parallel import ParallelContext
from tests.helpers.megatron_cases import (
    CASES,
    INERT,
    TE_CASES,
    Case,
    another_value,
    check_case,
    largest_difference,
    name_of,
    needs_experts,
    take_step,
    tiny_config,
)

# The stand-in's attention has no dropout.
TRIED = [case for case in (*CASES, *TE_CASES) if "attention_dropout" not in case]


@pytest.fixture(scope="module")
def plain(te: ParallelContext) -> dict[bool, dict[str, Tensor]]:
    """The step without any field, with and without experts."""
    return {experts: take_step(tiny_config(experts), te) for experts in (True, False)}


@pytest.mark.parametrize("experts", [True, False], ids=["moe", "dense"])
@pytest.mark.parametrize("case", TRIED, ids=name_of)
def test_fields_that_may_be_set(
    te: ParallelContext, plain: dict[bool, dict[str, Tensor]], case: Case, experts: bool
) -> None:
    if needs_experts(case) and not experts:
        return  # refused with and without Transformer Engine
    check_case(case, take_step(tiny_config(experts, **case), te), plain[experts])


@pytest.mark.parametrize("name", INERT)
def test_fields_that_change_nothing(
    te: ParallelContext, plain: dict[bool, dict[str, Tensor]], name: str
) -> None:
    """They are refused because of that, and here given to Megatron all the same."""
    for experts in (True, False):
        found = take_step(tiny_config(experts), te, {name: another_value(name)})
        assert largest_difference(found, plain[experts]) == 0.0
