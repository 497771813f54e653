"""The stream: one order for every layout, every number of workers, and every restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.records.llava import BadRecord, RecordFile
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.dataset import LlavaDataset, Source
from moiie_megatron.data.stream.loader import SampleOrder, build_loader

GLOBAL, MICRO, STEPS = 8, 2, 5  # 40 samples of 23: nearly two epochs


def stream(dataset: LlavaDataset, **options: object) -> Iterator[Batch]:
    defaults: dict[str, object] = {
        "seed": 7, "consumed_samples": 0, "global_batch_size": GLOBAL, "num_steps": STEPS,
        "micro_batch_size": MICRO, "dp_rank": 0, "dp_size": 1,
    }  # fmt: skip
    return build_loader(dataset, **{**defaults, **options})  # type: ignore[arg-type]


def run(dataset: LlavaDataset, dp_size: int = 1, **options: object) -> list[Batch]:
    """All micro-batches of a run in global order, whatever the number of ranks."""
    ranks = [list(stream(dataset, dp_rank=r, dp_size=dp_size, **options)) for r in range(dp_size)]
    return [batch for together in zip(*ranks, strict=True) for batch in together]


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert [b.record_ids for b in got] == [b.record_ids for b in expected]
    for a, b in zip(got, expected, strict=True):
        assert a.skipped_samples == b.skipped_samples
        for name in ("tokens", "labels", "position_ids", "token_types", "images"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_every_epoch_is_another_permutation() -> None:
    order = SampleOrder(23, seed=7)
    epochs = [[order.sample_at(e * 23 + i) for i in range(23)] for e in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(23))
    assert [SampleOrder(23, seed=7).sample_at(n) for n in (50, 3)] == [epochs[2][4], epochs[0][3]]
    assert [SampleOrder(23, seed=8).sample_at(n) for n in range(23)] != epochs[0]


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run must go on in the same order after an upgrade: frozen values."""
    assert [SampleOrder(6, seed=1234).sample_at(n) for n in range(12)] == FROZEN


FROZEN = [1, 2, 0, 3, 5, 4, 3, 0, 5, 4, 1, 2]


def test_the_stream_follows_the_order(dataset: LlavaDataset) -> None:
    order = SampleOrder(23, seed=7)
    ids = [name for batch in run(dataset) for name in batch.record_ids]
    assert ids == [f"r{order.sample_at(n)}" for n in range(GLOBAL * STEPS)]


@pytest.mark.parametrize("dp_size", [2, 4])
def test_any_number_of_ranks(dataset: LlavaDataset, dp_size: int) -> None:
    assert_same(run(dataset, dp_size), run(dataset))


@pytest.mark.parametrize(("num_workers", "start_method"), [(1, "fork"), (2, "fork"), (2, "spawn")])
def test_any_number_of_workers(dataset: LlavaDataset, num_workers: int, start_method: str) -> None:
    got = list(stream(dataset, num_workers=num_workers, start_method=start_method))
    assert_same(got, run(dataset))


@pytest.mark.parametrize(("dp_size", "num_workers"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_resume_anywhere(dataset: LlavaDataset, dp_size: int, num_workers: int) -> None:
    whole = run(dataset)
    for step in (1, 3):
        rest = run(
            dataset, dp_size, consumed_samples=step * GLOBAL, num_steps=STEPS - step,
            num_workers=num_workers,
        )  # fmt: skip
        assert_same(rest, whole[step * GLOBAL // MICRO :])


def test_the_stream_is_endless_and_leaves_the_rng_alone(dataset: LlavaDataset) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    batches = stream(dataset, num_steps=None, num_workers=1, start_method="fork")
    ids = [name for _ in range(30) for name in next(batches).record_ids]
    assert len(ids) == 60 and set(ids[46:]) < set(ids[:23])
    assert torch.equal(torch.rand(4), expected)


def test_batch_sizes_must_fit(dataset: LlavaDataset) -> None:
    with pytest.raises(ValueError, match=r"8 is not a multiple of .* 2 x 3 .* multiple of 6"):
        stream(dataset, dp_size=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        stream(dataset, dp_size=2, dp_rank=2)


def test_sources_are_concatenated(dataset: LlavaDataset, corpus: Path) -> None:
    source = dataset.sources[0]
    (corpus / "one.json").write_text(
        "[" + (corpus / "records.jsonl").read_text().split("\n")[1] + "]"
    )
    one = Source(RecordFile(corpus / "one.json"), source.images)
    make = (dataset.tokenizer, dataset.template, 4, 64)
    both = LlavaDataset([one, source, one], *make)
    assert len(both) == 25
    assert [both[i].record_id for i in (0, 1, 23, 24)] == ["r1", "r0", "r22", "r1"]
    assert both.record(24).id == "r1"
    with pytest.raises(IndexError):
        both[25]
    with pytest.raises(ValueError, match="data.sources is empty"):
        LlavaDataset([], *make)
    half = (0.5, 0.5, 0.5)
    large = Source(one.records, ImageLoader(corpus / "images", 16, "pad", half, half))
    with pytest.raises(ValueError, match=r"image sizes \[8, 16\]"):
        LlavaDataset([one, large], *make)


def test_samples_carry_their_images(dataset: LlavaDataset) -> None:
    assert dataset[3].images.shape == (0, 3, 8, 8)  # text only
    pair = dataset[4].images
    assert pair.shape == (2, 3, 8, 8)
    assert pair[:, 0, 0, 0].tolist() == [40, 20]
    assert (dataset[4].encoded.token_types == 1).sum() == 8


def test_bad_samples_name_file_and_record(dataset: LlavaDataset, corpus: Path) -> None:
    (corpus / "images" / "5.png").unlink()
    with pytest.raises(BadRecord, match="5.png does not exist") as caught:
        dataset[5]
    assert (caught.value.file, caught.value.index) == (str(corpus / "records.jsonl"), 5)


def test_replaced_alike_in_every_layout(damaged: LlavaDataset, corpus: Path) -> None:
    whole = run(damaged)
    names = [name for batch in whole for name in batch.record_ids]
    assert len(names) == 40 and not {f"r{i}" for i in (5, 7, 11)} & set(names)
    skipped_samples = [fault for batch in whole for fault in batch.skipped_samples]
    assert {fault.index for fault in skipped_samples} == {5, 7, 11}
    assert {fault.file for fault in skipped_samples} == {str(corpus / "records.jsonl")}
    assert all("cannot be read" in fault.reason for fault in skipped_samples)
    assert_same(run(damaged, dp_size=2), whole)
    assert_same(list(stream(damaged, num_workers=2, start_method="fork")), whole)
    assert_same(run(damaged, dp_size=4, consumed_samples=16, num_steps=3), whole[8:])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_chain_of_bad_samples_stops_the_run(
    damaged: LlavaDataset, corpus: Path, num_workers: int
) -> None:
    path = corpus / "records.jsonl"
    size = path.stat().st_size
    path.write_bytes(b"\0" * size)  # same length: only the content is gone
    batches = stream(damaged, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"^Stopping: 10 samples in a row .*records.jsonl\[") as e:
        next(batches)
    assert "Traceback" not in str(e.value)
