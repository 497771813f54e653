"""The packed stream: the samples of the plain one, for every layout, worker and restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.data.stream.packed_loader import build_packed_loader
from moiie_megatron.data.stream.packing import PackingSpec
from tests.helpers.user_errors import user_error
from tests.unit.data.stream.streams import (
    GLOBAL,
    MICRO,
    STEPS,
    assert_same_stream,
    settings,
)
from tests.unit.data.stream.streams import run as plain_run

SPEC = PackingSpec(capacity=128, sequence_length=64, num_image_tokens=4, pad_id=3)


def stream(
    dataset: LlavaDataset, max_over_dp: Callable[[int], int] = int, **changes: object
) -> list[list[Batch]]:
    return list(build_packed_loader(dataset, settings(**changes), SPEC, max_over_dp))


def assert_same_steps(got: list[list[Batch]], expected: list[list[Batch]]) -> None:
    assert len(got) == len(expected)
    for step, other in zip(got, expected, strict=True):
        assert_same_stream(step, other)


def names(batches: list[Batch]) -> Counter[str]:
    return Counter(name for batch in batches for name in batch.record_ids)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_every_step_has_the_samples_of_the_plain_stream(
    damaged: LlavaDataset, dp_size: int
) -> None:
    whole = plain_run(damaged)
    skipped_samples, rows_packed, rows_plain = [], 0, 0
    for rank in range(dp_size):
        steps = stream(damaged, dp_rank=rank, dp_size=dp_size)
        per_step = GLOBAL // MICRO
        for number, rows in enumerate(steps):
            plain = whole[number * per_step : (number + 1) * per_step][rank::dp_size]
            assert names(rows) == names(plain)
            rows_packed += len(rows)
            rows_plain += len(plain)
            for token_type in (0, 1):
                count = sum(int((batch.token_types == token_type).sum()) for batch in plain)
                assert count == sum(int((row.token_types == token_type).sum()) for row in rows)
            skipped_samples += [skipped for row in rows for skipped in row.skipped_samples]
    assert rows_packed < rows_plain
    assert Counter(skipped_samples) == Counter(
        skipped for batch in whole for skipped in batch.skipped_samples
    )


@pytest.mark.parametrize(
    ("num_workers", "start_method"), [(1, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_any_number_of_workers(damaged: LlavaDataset, num_workers: int, start_method: str) -> None:
    got = stream(damaged, num_workers=num_workers, start_method=start_method)
    assert_same_steps(got, stream(damaged))


def test_resume_anywhere(dataset: LlavaDataset) -> None:
    whole = stream(dataset)
    for step in (1, 3):
        rest = stream(dataset, consumed_samples=step * GLOBAL, num_steps=STEPS - step)
        assert_same_steps(rest, whole[step:])


def test_all_ranks_have_as_many_rows_as_the_one_with_the_most(dataset: LlavaDataset) -> None:
    ranks = [stream(dataset, dp_rank=rank, dp_size=2) for rank in (0, 1)]
    counts: list[int] = []

    def max_over_dp(count: int) -> int:
        counts.append(count)
        return 3

    steps = stream(dataset, max_over_dp, dp_size=2)
    assert counts == [len(rows) for rows in ranks[0]]
    assert [len(rows) for rows in steps] == [3] * STEPS
    assert [names(rows) for rows in steps] == [names(rows) for rows in ranks[0]]
    assert all(row.record_ids for rows in steps for row in rows)


def test_errors_are_sentences(damaged: LlavaDataset) -> None:
    path = damaged.sources[0].records.path
    path.write_bytes(b"\0" * path.stat().st_size)
    with user_error("10 samples in a row", path):
        stream(damaged, num_workers=1)


def test_rows_leave_the_rng_alone(dataset: LlavaDataset) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    stream(dataset, num_workers=1)
    assert torch.equal(torch.rand(4), expected)
