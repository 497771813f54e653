"""Worker processes: few open files, and no end of one is a traceback or a hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.packing.packed_loader import pack_steps, read_steps
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.stream import worker
from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.data.stream.example import Example
from tests.helpers.open_files import few_open_files
from tests.helpers.user_errors import user_error
from tests.unit.data.stream.streams import assert_same_stream, run, settings, stream

SPEC = PackingSpec(capacity=64, sequence_length=64, num_image_tokens=4, pad_id=3)


@pytest.fixture
def few_files() -> Iterator[None]:
    with few_open_files(64):
        yield


@pytest.mark.usefixtures("few_files")
def test_all_micro_batches_of_a_step_are_held(dataset: LlavaDataset) -> None:
    many = {"global_batch_size": 128, "micro_batch_size": 1, "num_steps": 2}
    got = list(stream(dataset, num_workers=2, start_method="fork", **many))
    assert_same_stream(got, run(dataset, **many))
    assert len(got) == 256


@pytest.mark.usefixtures("few_files")
def test_a_packed_step_of_many_rows(dataset: LlavaDataset) -> None:
    many = settings(
        global_batch_size=256, micro_batch_size=1, num_steps=2, num_workers=2, start_method="fork"
    )
    steps = list(pack_steps(read_steps(dataset, many), SPEC))
    assert len(steps) == 2 and all(len(rows) > 64 for rows in steps)
    assert all(sum(len(row.record_ids) for row in rows) == 256 for rows in steps)


class Hanging(LlavaDataset):
    """Its second half never comes."""

    def __getitem__(self, i: int) -> Example:
        if i >= 11:
            time.sleep(600)
        return super().__getitem__(i)


class Ending(LlavaDataset):
    """Its second half ends the worker as want of memory does."""

    def __getitem__(self, i: int) -> Example:
        if i >= 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


class Unreadable(LlavaDataset):
    """Its second half is on a disk that fails."""

    def __getitem__(self, i: int) -> Example:
        if i >= 11:
            raise OSError(5, "Input/output error", "records.jsonl")
        return super().__getitem__(i)


def other(kind: type[LlavaDataset], dataset: LlavaDataset) -> LlavaDataset:
    encoding: Encoding = dataset.encoding
    return kind(dataset.sources, encoding)


def test_a_request_to_stop_ends_the_wait(
    dataset: LlavaDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 0.5)
    before = set(multiprocessing.active_children())
    batches = stream(
        other(Hanging, dataset), num_workers=1, start_method="fork", is_stopping=lambda: True
    )
    started = time.monotonic()
    with user_error("asked to stop", "sent no samples", "last checkpoint"):
        list(batches)
    assert time.monotonic() - started < 10
    assert set(multiprocessing.active_children()) <= before


def test_slow_samples_are_waited_for(
    dataset: LlavaDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than the loader's own timeout."""
    monkeypatch.setattr("moiie_megatron.data.stream.loader.POLL_INTERVAL", 0.01)
    got = list(stream(dataset, num_workers=2, start_method="fork"))
    assert_same_stream(got, run(dataset))


def test_a_worker_that_is_killed_is_one_sentence(dataset: LlavaDataset) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    batches = stream(other(Ending, dataset), num_workers=2, start_method="fork")
    with user_error("process that reads samples has ended", "data.num_workers"):
        list(batches)
    assert signal.getsignal(signal.SIGCHLD) == handler  # a death cannot raise elsewhere


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_disk_that_fails_is_one_sentence(dataset: LlavaDataset, num_workers: int) -> None:
    batches = stream(other(Unreadable, dataset), num_workers=num_workers, start_method="fork")
    with user_error("Samples cannot be read", "Input/output error", "records.jsonl"):
        list(batches)


def test_no_shared_memory_is_one_sentence(
    dataset: LlavaDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>\nmore")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    batches = stream(dataset, num_workers=1, start_method="fork")
    with user_error("no shared memory", "for file </torch_1>", "--shm-size"):
        next(batches)


def test_a_bug_in_a_worker_keeps_its_traceback() -> None:
    for error in (RuntimeError("DataLoader"), KeyError("x"), FileNotFoundError("Caught y")):
        assert worker.worker_failure(error) is None
    for lost in (ConnectionResetError("by peer"), EOFError(), RuntimeError("DataLoader worker x")):
        assert worker.worker_failure(lost) is not None
