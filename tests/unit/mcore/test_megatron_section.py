"""Every field of the installed TransformerConfig does what the tables of the section say."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from moiie_megatron.config.megatron_section.allowed import ALLOWED, Allowed
from moiie_megatron.config.megatron_section.fields import classify
from moiie_megatron.config.megatron_section.refused import Refused
from moiie_megatron.mcore.parallel import ParallelContext
from tests.helpers.megatron_cases import (
    CASES,
    STAGE_CASES,
    TE_CASES,
    Case,
    largest_difference,
    name_of,
    needs_experts,
    take_step,
    tiny_config,
)
from tests.helpers.user_errors import user_error

FIELDS = {field.name: field for field in dataclasses.fields(TransformerConfig)}
INERT = sorted(
    name for name in FIELDS if isinstance(kind := classify(name), Refused) and kind.inert
)


def test_every_field_is_in_a_table() -> None:
    """One that a new version of Megatron-Core adds has to be looked at first."""
    assert [name for name in FIELDS if classify(name) is None] == []


def test_every_field_that_may_be_set_exists() -> None:
    assert set(ALLOWED) <= set(FIELDS)


def test_every_field_that_may_be_set_is_tried() -> None:
    assert {next(iter(case)) for case in (*CASES, *TE_CASES, *STAGE_CASES)} == set(ALLOWED)


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


def check_case(case: Case, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    difference = largest_difference(found, wanted)
    assert all(values.isfinite().all() for values in found.values())
    losses = ALLOWED[next(iter(case))].losses
    if losses == "the same":
        assert difference == 0.0
    elif losses == "the same up to rounding":
        assert difference < 1e-5
    else:
        assert difference > 1e-4


@pytest.mark.parametrize("case", TE_CASES, ids=name_of)
def test_fields_that_need_transformer_engine(context: ParallelContext, case: Case) -> None:
    assert not context.device.transformer_engine
    with user_error(f"megatron.{next(iter(case))}", "Transformer Engine", "leave it out"):
        take_step(tiny_config(True, **case), context)


@pytest.mark.parametrize(
    "name", [name for name in FIELDS if not isinstance(classify(name), Allowed)]
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


def another_value(name: str) -> Any:
    """A value of a field's type that is not its default."""
    kind = get_type_hints(TransformerConfig)[name]
    kinds = [part for part in get_args(kind) if part is not type(None)] or [kind]
    default = FIELDS[name].default
    if get_origin(kind) is None and kind is bool:
        return not default
    values: dict[Any, tuple[Any, ...]] = {int: (2, 3), float: (0.5, 0.25), str: ("other",)}
    values |= {bool: (True,), list[int]: ([1],), list[str]: (["other"],)}
    literals = [part for part in (*kinds, *get_args(kinds[0])) if isinstance(part, str)]
    return next(value for value in (*literals, *values.get(kinds[0], (1,))) if value != default)
