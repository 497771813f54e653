"""Every field of the installed TransformerConfig does what the tables of the section say."""

from __future__ import annotations

import pytest
from torch import Tensor

from moiie_megatron.config.megatron_section.sections import MEGATRON
from moiie_megatron.config.megatron_section.table import Allowed
from moiie_megatron.config.megatron_section.transformer.allowed import ALLOWED
from moiie_megatron.mcore.parallel import ParallelContext
from tests.helpers.megatron_cases import (
    CASES,
    FIELDS,
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
from tests.helpers.user_errors import user_error


def test_every_field_is_in_a_table() -> None:
    """One that a new version of Megatron-Core adds has to be looked at first."""
    assert [name for name in FIELDS if MEGATRON.classify(name) is None] == []


def test_every_field_that_may_be_set_exists() -> None:
    assert set(ALLOWED) <= set(FIELDS)


def test_every_field_that_may_be_set_is_tried() -> None:
    assert {next(iter(case)) for case in (*CASES, *TE_CASES)} == set(ALLOWED)


@pytest.fixture(scope="module")
def plain(context: ParallelContext) -> dict[bool, dict[str, Tensor]]:
    """The step without any field, with and without experts."""
    return {experts: take_step(tiny_config(experts), context) for experts in (True, False)}


def test_a_step_is_reproducible(
    context: ParallelContext, plain: dict[bool, dict[str, Tensor]]
) -> None:
    again = take_step(tiny_config(True), context)
    assert largest_difference(again, plain[True]) == 0.0
    assert len(again) > 50 and all(values.any() for name, values in again.items() if "fc" in name)


@pytest.mark.parametrize("experts", [True, False], ids=["moe", "dense"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_fields_that_may_be_set(
    context: ParallelContext, plain: dict[bool, dict[str, Tensor]], case: Case, experts: bool
) -> None:
    config = tiny_config(experts, **case)
    if needs_experts(case) and not experts:
        with user_error("megatron.recompute_modules", "experts"):
            take_step(config, context)
        return
    check_case(case, take_step(config, context), plain[experts])


@pytest.mark.parametrize(
    "recompute",
    [case for case in CASES if "recompute_granularity" in case],
    ids=name_of,
)
def test_dropout_is_replayed(context: ParallelContext, recompute: Case) -> None:
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    plain, replayed = (
        take_step(tiny_config(True, **dropout, **case), context) for case in ({}, recompute)
    )
    assert largest_difference(replayed, plain) == 0.0


@pytest.mark.parametrize("case", TE_CASES, ids=name_of)
def test_fields_that_need_transformer_engine(context: ParallelContext, case: Case) -> None:
    assert not context.device.transformer_engine
    with user_error(f"megatron.{next(iter(case))}", "Transformer Engine", "leave it out"):
        take_step(tiny_config(True, **case), context)


@pytest.mark.parametrize(
    "name", [name for name in FIELDS if not isinstance(MEGATRON.classify(name), Allowed)]
)
def test_fields_that_may_not_be_set(context: ParallelContext, name: str) -> None:
    value = another_value(name)
    with user_error(f"megatron.{name}", repr(value)[:60]):
        take_step(tiny_config(True, **{name: value}), context)


@pytest.mark.parametrize("name", INERT)
def test_fields_that_change_nothing(
    context: ParallelContext, plain: dict[bool, dict[str, Tensor]], name: str
) -> None:
    """They are refused because of that, and here given to Megatron all the same."""
    for experts in (True, False):
        found = take_step(tiny_config(experts), context, {name: another_value(name)})
        assert largest_difference(found, plain[experts]) == 0.0
