"""Which rank reads which sample: the same global batches on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import settings as checks
from hypothesis import strategies as st

from moiie_megatron.data.stream.order import SampleOrder
from moiie_megatron.data.stream.sampler import MicroBatchSampler, StepSampler
from moiie_megatron.data.stream.settings import LoaderSettings

CHECKS = checks(max_examples=60, deadline=None, derandomize=True)
SETTINGS = st.builds(
    lambda seed, micro, dp_size, per_rank, steps: LoaderSettings(
        seed=seed,
        global_batch_size=micro * dp_size * per_rank,
        micro_batch_size=micro,
        dp_rank=0,
        dp_size=dp_size,
        num_steps=steps,
    ),
    st.integers(0, 1000),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
)


def micro_batches(settings: LoaderSettings, size: int) -> list[list[int]]:
    """Those of all ranks, in global order."""
    order = SampleOrder(size, settings.seed)
    ranks = [
        list(MicroBatchSampler(order, replace(settings, dp_rank=rank)))
        for rank in range(settings.dp_size)
    ]
    return [batch for together in zip(*ranks, strict=True) for batch in together]


@CHECKS
@given(SETTINGS, st.integers(1, 40))
def test_the_ranks_together_read_the_samples_in_order(settings: LoaderSettings, size: int) -> None:
    assert settings.num_steps is not None
    batches = micro_batches(settings, size)
    assert all(len(batch) == settings.micro_batch_size for batch in batches)
    order = SampleOrder(size, settings.seed)
    total = settings.num_steps * settings.global_batch_size
    assert sum(batches, []) == [order.sample_at(n) for n in range(total)]
    # Whatever the number of ranks, so any other number of ranks reads the same global batches.
    alone = replace(settings, dp_size=1)
    assert micro_batches(alone, size) == batches


@CHECKS
@given(SETTINGS, st.integers(1, 40), st.integers(0, 5))
def test_resuming_is_slicing(settings: LoaderSettings, size: int, done: int) -> None:
    assert settings.num_steps is not None
    whole = micro_batches(replace(settings, num_steps=settings.num_steps + done), size)
    consumed = done * settings.global_batch_size
    rest = micro_batches(replace(settings, consumed_samples=consumed), size)
    assert rest == whole[consumed // settings.micro_batch_size :]


@CHECKS
@given(SETTINGS, st.integers(1, 40), st.data())
def test_a_step_has_the_samples_of_its_micro_batches(
    settings: LoaderSettings, size: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, settings.dp_size - 1))
    settings = replace(settings, dp_rank=rank)
    order = SampleOrder(size, settings.seed)
    batches = list(MicroBatchSampler(order, settings))
    per_step = settings.micro_batches_per_step
    assert list(StepSampler(order, settings)) == [
        sum(batches[i : i + per_step], []) for i in range(0, len(batches), per_step)
    ]
    assert settings.samples_per_step == per_step * settings.micro_batch_size


def test_without_a_number_of_steps_it_is_endless() -> None:
    settings = LoaderSettings(seed=1, global_batch_size=2, micro_batch_size=1, dp_rank=1, dp_size=2)
    order = SampleOrder(3, 1)
    found = list(islice(MicroBatchSampler(order, settings), 50))
    assert found == [[order.sample_at(2 * step + 1)] for step in range(50)]


@pytest.mark.parametrize(
    "wrong",
    [{"global_batch_size": 6}, {"global_batch_size": 0}, {"dp_rank": 2}, {"consumed_samples": -1}],
)
def test_what_the_configuration_rules_out(wrong: dict[str, int]) -> None:
    settings = LoaderSettings(seed=1, global_batch_size=8, micro_batch_size=2, dp_rank=0, dp_size=2)
    with pytest.raises(AssertionError):
        replace(settings, **wrong)  # type: ignore[arg-type]
