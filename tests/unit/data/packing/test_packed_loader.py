"""The packed stream: the samples of the plain one, for every layout, worker and restart."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from moiie_megatron.data.packing.packed_loader import pack_steps, read_steps
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.dataset import LlavaDataset
from tests.helpers.thread_ranks import ThreadRank, on_ranks
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
    dataset: LlavaDataset,
    ranks: ThreadRank | None = None,
    rows_multiple_of: int = 1,
    **changes: object,
) -> list[list[Batch]]:
    steps = read_steps(dataset, settings(**changes))
    return list(pack_steps(steps, SPEC, ranks, rows_multiple_of=rows_multiple_of))


def streams(dataset: LlavaDataset, dp_size: int, **changes: object) -> list[list[list[Batch]]]:
    """The streams of all ranks."""

    def own(rank: ThreadRank) -> list[list[Batch]]:
        return stream(dataset, rank, dp_rank=rank.dp_rank, dp_size=dp_size, **changes)

    return on_ranks(dp_size, own)


def assert_same_steps(got: list[list[Batch]], expected: list[list[Batch]]) -> None:
    assert len(got) == len(expected)
    for step, other in zip(got, expected, strict=True):
        assert_same_stream(step, other)


def names(batches: list[Batch]) -> Counter[str]:
    return Counter(name for batch in batches for name in batch.record_ids)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_every_step_has_the_samples_of_the_plain_stream(
    damaged: LlavaDataset, dp_size: int
) -> None:
    plain = plain_run(damaged)
    ranks = streams(damaged, dp_size)
    rows_packed = 0
    skipped_samples = []
    per_step = GLOBAL // MICRO
    for number in range(STEPS):
        rows = [row for rank in ranks for row in rank[number]]
        batches = plain[number * per_step : (number + 1) * per_step]
        assert names(rows) == names(batches)
        assert len({len(rank[number]) for rank in ranks}) == 1
        assert all(row.record_ids for row in rows)
        rows_packed += len(rows)
        for token_type in (0, 1):
            count = sum(int((batch.token_types == token_type).sum()) for batch in batches)
            assert count == sum(int((row.token_types == token_type).sum()) for row in rows)
        skipped_samples += [skipped for row in rows for skipped in row.skipped_samples]
    assert rows_packed < len(plain) or dp_size == 4
    # Every skipped sample is reported once, whichever rank has its replacement.
    assert skipped_samples and Counter(skipped_samples) == Counter(
        skipped for batch in plain for skipped in batch.skipped_samples
    )


def test_samples_change_their_rank_as_they_are(dataset: LlavaDataset) -> None:
    """Every sample has the tokens and pixels that it has on a single rank."""

    def samples(batches: list[Batch]) -> dict[str, tuple[list[int], int]]:
        found = {}
        for row in batches:
            assert row.cu_seqlens is not None
            cuts = row.cu_seqlens.tolist()
            first_image = 0
            for name, start, end in zip(row.record_ids, cuts, cuts[1:], strict=False):
                count = int((row.token_types[0, start:end] == 1).sum()) // SPEC.num_image_tokens
                pixels = row.images[first_image : first_image + count].long()
                first_image += count
                found[name] = (row.tokens[0, start:end].tolist(), int(pixels.sum()))
        return found

    read: list[set[str]] = []

    def own(rank: ThreadRank) -> tuple[list[list[Batch]], list[int]]:
        changes = {"dp_rank": rank.dp_rank, "dp_size": 2}
        read.append({one.record_id for one in next(read_steps(dataset, settings(**changes)))})
        return stream(dataset, rank, **changes), rank.sent

    both = on_ranks(2, own)
    whole = stream(dataset)
    for number in range(STEPS):
        rows = [row for steps, _ in both for row in steps[number]]
        assert samples(rows) == samples(whole[number])
    # The comparison would hold for ranks that keep what they read.
    first = [set(names(steps[0])) for steps, _ in both]
    assert not any(rank <= own for rank in first for own in read)
    assert all(sum(sent) > 0 and len(sent) == STEPS for _, sent in both)


def test_a_number_of_rows_that_a_schedule_needs(dataset: LlavaDataset) -> None:
    ranks = streams(dataset, 2, rows_multiple_of=2)
    assert {len(rows) for steps in ranks for rows in steps} == {2}
    assert {len(rows) for steps in streams(dataset, 2) for rows in steps} == {1, 2}
    # One sample per row is as far as rows can be split.
    ranks = streams(dataset, 2, rows_multiple_of=8)
    assert {len(row.record_ids) for steps in ranks for rows in steps for row in rows} == {1}


@pytest.mark.parametrize(
    ("num_workers", "start_method"), [(1, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_any_number_of_workers(damaged: LlavaDataset, num_workers: int, start_method: str) -> None:
    got = stream(damaged, num_workers=num_workers, start_method=start_method)
    assert_same_steps(got, stream(damaged))


def test_resume_anywhere(dataset: LlavaDataset) -> None:
    whole = streams(dataset, 2)
    for step in (1, 3):
        rest = streams(dataset, 2, consumed_samples=step * GLOBAL, num_steps=STEPS - step)
        for got, expected in zip(rest, whole, strict=True):
            assert_same_steps(got, expected[step:])


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


def test_rows_are_pinned_if_asked(dataset: LlavaDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the samples, which are copied into them: pinning is slow."""
    pinned: list[Batch] = []

    def pin(batch: Batch) -> Batch:
        pinned.append(batch)
        return batch

    monkeypatch.setattr(Batch, "pin_memory", pin)
    steps = list(pack_steps(read_steps(dataset, settings(pin_memory=True)), SPEC, pin_memory=True))
    assert pinned == [row for rows in steps for row in rows]
