"""Every field of Megatron's classes for DDP and the optimizer does what the tables say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from moiie_megatron.config.megatron_section.sections import DDP, OPTIMIZER
from moiie_megatron.config.megatron_section.table import Allowed, MegatronSection
from moiie_megatron.mcore.device_checks import own_globals
from moiie_megatron.mcore.parallel import ParallelContext
from tests.helpers.megatron_cases import Case, largest_difference, name_of
from tests.helpers.training_cases import (
    CLASSES,
    DDP_CASES,
    GPU_CASES,
    OPTIMIZER_CASES,
    fields_of,
    take_steps,
    with_fields,
)
from tests.helpers.user_errors import user_error

SECTIONS = pytest.mark.parametrize("section", [DDP, OPTIMIZER], ids=lambda section: section.key)
NOT_ALLOWED = [
    (section, name)
    for section in (DDP, OPTIMIZER)
    for name in fields_of(section)
    if not isinstance(section.classify(name), Allowed)
]


@SECTIONS
def test_every_field_is_in_a_table(section: MegatronSection) -> None:
    """One that a new version of Megatron-Core adds has to be looked at first."""
    assert CLASSES[section.key].__name__ == section.class_name
    assert [name for name in fields_of(section) if section.classify(name) is None] == []


@SECTIONS
def test_every_field_that_may_be_set_exists_and_is_tried(section: MegatronSection) -> None:
    assert set(section.allowed) <= set(fields_of(section))
    cases = list(DDP_CASES if section is DDP else OPTIMIZER_CASES)
    cases += [case for owner, case in GPU_CASES if owner is section]
    assert {next(iter(case)) for case in cases} == set(section.allowed)


@pytest.fixture(scope="module")
def plain(context: ParallelContext) -> dict[str, Tensor]:
    return take_steps(with_fields(DDP, {}), context)


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with own_globals():
        yield


@pytest.mark.parametrize("case", DDP_CASES, ids=name_of)
def test_fields_that_may_be_set(
    context: ParallelContext, plain: dict[str, Tensor], case: Case
) -> None:
    """In one process; test_mixed_modalities.py has reductions and gathers of two."""
    found = take_steps(with_fields(DDP, case), context)
    assert all(values.isfinite().all() for values in found.values())
    difference = largest_difference(found, plain)
    is_same = DDP.allowed[next(iter(case))].losses != "different"
    assert difference == 0.0 if is_same else difference > 1e-4


@pytest.mark.parametrize(("section", "case"), GPU_CASES, ids=str)
def test_fields_that_need_a_gpu(
    context: ParallelContext, section: MegatronSection, case: Case
) -> None:
    with user_error(f"{section.key}.", "device is cpu", "leave it out"):
        take_steps(with_fields(section, case), context)


@pytest.mark.parametrize("case", OPTIMIZER_CASES, ids=name_of)
def test_fields_that_need_transformer_engine(context: ParallelContext, case: Case) -> None:
    with user_error("use_precision_aware_optimizer is true", "Transformer Engine's Adam"):
        take_steps(with_fields(OPTIMIZER, case), context)


@pytest.mark.parametrize(
    "case", [{"bucket_size": 2000}, {"overlap_param_gather": True}], ids=name_of
)
def test_communication_overlaps_on_gpus_unless_told_otherwise(
    context: ParallelContext, case: dict[str, Any]
) -> None:
    with user_error(f"ddp.{next(iter(case))}", "default on cpu is false", "overlap_grad_reduce"):
        take_steps(with_fields(DDP, case), context)


@pytest.mark.parametrize(("section", "name"), NOT_ALLOWED)
def test_fields_that_may_not_be_set(
    context: ParallelContext, section: MegatronSection, name: str
) -> None:
    with user_error(f"{section.key}.{name} is 'something'"):
        take_steps(with_fields(section, {name: "something"}), context)
