"""Audits of good and damaged data: lengths by hand, every unusable record named."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiie_megatron.data.audit.audit import audit
from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.records.record import Record
from moiie_megatron.data.stream.dataset import LlavaDataset, Source
from tests.helpers.damaged_data import DAMAGES, write_damaged
from tests.helpers.user_errors import user_error


def shortened(encoding: Encoding, sequence_length: int) -> Encoding:
    return Encoding(encoding.tokenizer, encoding.template, 4, sequence_length)


def test_lengths_are_those_of_training(dataset: LlavaDataset) -> None:
    found = audit(dataset.sources[0], dataset.encoding)
    assert found.lengths.tolist() == [len(dataset[i].encoded.tokens) for i in range(23)]
    assert found.images.tolist() == [len(dataset[i].images) for i in range(23)]
    assert found.labels.tolist() == [
        int((dataset[i].encoded.labels != IGNORE).sum()) for i in range(23)
    ]
    assert found.images.sum() == 16 and found.images[4] == 2
    assert found.skipped_samples == () and found.skipped_fraction == 0
    again = audit(dataset.sources[0], dataset.encoding, workers=2)
    assert again.lengths.tolist() == found.lengths.tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_every_broken_record_is_named(
    tmp_path: Path, dataset: LlavaDataset, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moiie_megatron.data.audit.audit.PORTION", 7)  # several for each process
    data = write_damaged(tmp_path / "d", samples=48, bad=16)
    half = (0.5, 0.5, 0.5)
    source = Source(RecordFile(data.records), ImageLoader(data.images, 8, "square", half))
    seen: list[tuple[int, int]] = []
    found = audit(
        source, dataset.encoding, workers=workers, progress=lambda *step: seen.append(step)
    )
    assert [skipped.index for skipped in found.skipped_samples] == sorted(data.damage)
    for skipped in found.skipped_samples:
        assert DAMAGES[data.damage[skipped.index]] in skipped.reason
        assert skipped.file == str(data.records)
    assert found.skipped_fraction == 1 / 3
    assert seen[-1] == (48, 48) and len(seen) == 7
    # Without images only what the records themselves have wrong is seen.
    unseen = audit(source, None, decode_images=False)
    assert {data.damage[skipped.index] for skipped in unseen.skipped_samples} == {
        "malformed",
        "placeholders",
    }
    assert not unseen.lengths.any()


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(5, 64))
def test_what_is_skipped_is_what_training_skips(dataset: LlavaDataset, limit: int) -> None:
    source, encoding = dataset.sources[0], shortened(dataset.encoding, limit)
    found = audit(source, encoding, decode_images=False)
    whole = audit(source, dataset.encoding, decode_images=False)
    assert found.lengths.tolist() == whole.lengths.tolist()  # before truncation
    skipped = set()
    for i in range(len(source.records)):
        try:
            encoded = encoding.encode(source.records[i])
        except ValueError:
            skipped.add(i)
        else:
            assert len(encoded.tokens) == min(limit, found.lengths[i])
            assert int((encoded.labels != IGNORE).sum()) == found.labels[i]
    assert {sample.index for sample in found.skipped_samples} == skipped
    assert found.skipped_fraction == len(skipped) / 23


def test_a_limit_before_every_answer_skips_all(dataset: LlavaDataset) -> None:
    found = audit(dataset.sources[0], shortened(dataset.encoding, 6))
    assert len(found.skipped_samples) == 23 and found.skipped_fraction == 1


class Killed(Encoding):
    """An encoding in whose place the worker process is killed."""

    def measure(self, record: Record) -> tuple[int, int]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError(record)


class Buggy(Encoding):
    def measure(self, record: Record) -> tuple[int, int]:
        raise RuntimeError(f"bug at {record.id}")


def test_a_killed_worker_is_an_error_of_one_sentence(dataset: LlavaDataset) -> None:
    killed = Killed(dataset.encoding.tokenizer, dataset.encoding.template, 4, 64)
    with user_error(dataset.sources[0].records.path, "--workers"):
        audit(dataset.sources[0], killed, decode_images=False, workers=2)


def test_a_bug_in_a_worker_keeps_its_traceback(dataset: LlavaDataset) -> None:
    buggy = Buggy(dataset.encoding.tokenizer, dataset.encoding.template, 4, 64)
    with pytest.raises(RuntimeError, match="Traceback(.|\n)*bug at r0") as caught:
        audit(dataset.sources[0], buggy, decode_images=False, workers=2)
    caught.value.with_traceback(None)  # its frames keep the loader and its workers alive


def test_lengths_are_integers_of_numpy(dataset: LlavaDataset) -> None:
    found = audit(dataset.sources[0], dataset.encoding, decode_images=False)
    assert {x.dtype for x in (found.lengths, found.images, found.labels)} == {np.dtype(np.int32)}
