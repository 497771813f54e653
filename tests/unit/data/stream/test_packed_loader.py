"""The packed stream: the samples of the plain one, for every layout, worker and restart."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.data.stream.packed_loader import build_packed_loader
from moiie_megatron.data.stream.packing import PackingSpec
from tests.unit.data.stream.test_loader import GLOBAL, MICRO, STEPS
from tests.unit.data.stream.test_loader import run as plain_run
from tests.unit.data.stream.test_packing import assert_same

SHAPE = PackingSpec(capacity=128, sequence_length=64, num_image_tokens=4, pad_id=3)


def stream(dataset: LlavaDataset, **options: object) -> list[list[Batch]]:
    defaults: dict[str, object] = {
        "seed": 7, "consumed_samples": 0, "global_batch_size": GLOBAL, "num_steps": STEPS,
        "micro_batch_size": MICRO, "dp_rank": 0, "dp_size": 1, "most": int,
    }  # fmt: skip
    return list(build_packed_loader(dataset, SHAPE, **{**defaults, **options}))  # type: ignore[arg-type]


def assert_same_steps(got: list[list[Batch]], expected: list[list[Batch]]) -> None:
    assert len(got) == len(expected)
    for step, wanted in zip(got, expected, strict=True):
        for row, other in zip(step, wanted, strict=True):
            assert_same(row, other)
            assert row.skipped_samples == other.skipped_samples


def names(batches: list[Batch]) -> Counter[str]:
    return Counter(name for batch in batches for name in batch.record_ids)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_every_step_has_the_samples_of_the_plain_stream(
    damaged: LlavaDataset, dp_size: int
) -> None:
    whole = plain_run(damaged)
    skipped_samples, numbers = [], []
    for rank in range(dp_size):
        steps = stream(damaged, dp_rank=rank, dp_size=dp_size)
        per_step = GLOBAL // MICRO
        for number, rows in enumerate(steps):
            plain = whole[number * per_step : (number + 1) * per_step][rank::dp_size]
            assert names(rows) == names(plain)
            numbers += [len(rows), len(plain)]
            for kind in (0, 1):
                count = sum(int((batch.token_types == kind).sum()) for batch in plain)
                assert count == sum(int((row.token_types == kind).sum()) for row in rows)
            skipped_samples += [fault for row in rows for fault in row.skipped_samples]
    assert sum(numbers[::2]) < sum(numbers[1::2])
    assert Counter(skipped_samples) == Counter(
        fault for batch in whole for fault in batch.skipped_samples
    )


@pytest.mark.parametrize(("num_workers", "start_method"), [(1, "fork"), (2, "spawn")])
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
    asked: list[int] = []

    def most(number: int) -> int:
        asked.append(number)
        return 3

    split_rows_to_count = stream(dataset, dp_size=2, most=most)
    assert asked == [len(rows) for rows in ranks[0]]
    assert [len(rows) for rows in split_rows_to_count] == [3] * STEPS
    assert [names(rows) for rows in split_rows_to_count] == [names(rows) for rows in ranks[0]]
    assert all(row.record_ids for rows in split_rows_to_count for row in rows)


def test_errors_are_sentences(damaged: LlavaDataset) -> None:
    path = damaged.sources[0].records.path
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ValueError, match="^Stopping: 10 samples in a row") as caught:
        stream(damaged, num_workers=1)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(ValueError, match=r"8 is not a multiple of .* 2 x 3"):
        stream(damaged, dp_size=3)


def test_rows_leave_the_rng_alone(dataset: LlavaDataset) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    stream(dataset, num_workers=1)
    assert torch.equal(torch.rand(4), expected)
