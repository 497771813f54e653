"""The stream: one order for every layout, every number of workers, and every restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.data.stream.order import SampleOrder
from tests.helpers.user_errors import user_error
from tests.unit.data.stream.streams import (
    GLOBAL,
    MICRO,
    STEPS,
    assert_same_stream,
    run,
    stream,
)


def test_the_stream_follows_the_order(dataset: LlavaDataset) -> None:
    order = SampleOrder(23, seed=7)
    ids = [name for batch in run(dataset) for name in batch.record_ids]
    assert ids == [f"r{order.sample_at(n)}" for n in range(GLOBAL * STEPS)]


@pytest.mark.parametrize("dp_size", [2, 4])
def test_any_number_of_ranks(dataset: LlavaDataset, dp_size: int) -> None:
    assert_same_stream(run(dataset, dp_size), run(dataset))


@pytest.mark.parametrize(
    ("num_workers", "start_method"),
    [(1, "fork"), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)],
)
def test_any_number_of_workers(dataset: LlavaDataset, num_workers: int, start_method: str) -> None:
    got = list(stream(dataset, num_workers=num_workers, start_method=start_method))
    assert_same_stream(got, run(dataset))


@pytest.mark.parametrize(("dp_size", "num_workers"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_resume_anywhere(dataset: LlavaDataset, dp_size: int, num_workers: int) -> None:
    whole = run(dataset)
    for step in (1, 3):
        rest = run(
            dataset, dp_size, consumed_samples=step * GLOBAL, num_steps=STEPS - step,
            num_workers=num_workers,
        )  # fmt: skip
        assert_same_stream(rest, whole[step * GLOBAL // MICRO :])


def test_the_stream_is_endless_and_leaves_the_rng_alone(dataset: LlavaDataset) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    batches = stream(dataset, num_steps=None, num_workers=1, start_method="fork")
    ids = [name for _ in range(30) for name in next(batches).record_ids]
    assert len(ids) == 60 and set(ids[46:]) < set(ids[:23])
    assert torch.equal(torch.rand(4), expected)


def test_replaced_alike_in_every_layout(damaged: LlavaDataset, corpus: Path) -> None:
    whole = run(damaged)
    names = [name for batch in whole for name in batch.record_ids]
    assert len(names) == 40 and not {f"r{i}" for i in (5, 7, 11)} & set(names)
    skipped_samples = [skipped for batch in whole for skipped in batch.skipped_samples]
    assert {skipped.index for skipped in skipped_samples} == {5, 7, 11}
    assert {skipped.file for skipped in skipped_samples} == {str(corpus / "records.jsonl")}
    assert all(f"{skipped.index}.png" in skipped.reason for skipped in skipped_samples)
    assert_same_stream(run(damaged, dp_size=2), whole)
    assert_same_stream(list(stream(damaged, num_workers=2, start_method="fork")), whole)
    assert_same_stream(run(damaged, dp_size=4, consumed_samples=16, num_steps=3), whole[8:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_chain_of_bad_samples_stops_the_run(
    damaged: LlavaDataset, corpus: Path, num_workers: int
) -> None:
    path = corpus / "records.jsonl"
    size = path.stat().st_size
    path.write_bytes(b"\0" * size)  # same length: only the content is gone
    batches = stream(damaged, num_workers=num_workers)
    with user_error("10 samples in a row", f"{path}["):
        next(batches)
