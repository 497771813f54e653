"""Surveys of good and broken data, lengths by hand, and the index that keeps them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest

from moiie_megatron.data.audit.audit import Encoding, audit
from moiie_megatron.data.audit.lengths import (
    LengthKey,
    length_files,
    read_lengths,
    rows_needed,
    write_lengths,
)
from moiie_megatron.data.audit.report import summarize, table
from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.stream.dataset import LlavaDataset, Source
from tests.helpers.damaged_data import DAMAGES, write_damaged


@pytest.fixture
def encoding(dataset: LlavaDataset) -> Encoding:
    return Encoding(dataset.tokenizer, dataset.template, 4, 64)


def test_lengths_are_those_of_training(dataset: LlavaDataset, encoding: Encoding) -> None:
    found = audit(dataset.sources[0], encoding)
    assert found.lengths.tolist() == [len(dataset[i].encoded.tokens) for i in range(23)]
    assert found.images.tolist() == [len(dataset[i].images) for i in range(23)]
    assert found.images.sum() == 16 and found.images[4] == 2
    assert found.skipped_samples == () and found.skipped_fraction == 0
    again = audit(dataset.sources[0], encoding, workers=2)
    assert again.lengths.tolist() == found.lengths.tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_every_broken_record_is_named(
    tmp_path: Path, encoding: Encoding, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moiie_megatron.data.audit.audit._PORTION", 7)  # several for each process
    data = write_damaged(tmp_path / "d", samples=48, bad=16)
    half = (0.5, 0.5, 0.5)
    source = Source(RecordFile(data.records), ImageLoader(data.images, 8, "square", half, half))
    seen: list[tuple[int, int]] = []
    found = audit(source, encoding, workers=workers, progress=lambda *step: seen.append(step))
    assert [fault.index for fault in found.skipped_samples] == sorted(data.damage)
    for fault in found.skipped_samples:
        assert DAMAGES[data.damage[fault.index]] in fault.reason
        assert fault.file == str(data.records)
    assert seen[-1] == (48, 48) and len(seen) == 7
    summary = summarize(found, encoding)
    assert (summary["samples"], summary["bad"], summary["skipped_fraction"]) == (48, 16, 1 / 3)
    assert summary["images_per_sample"] == {"1": 32}
    assert summary["image_tokens"] == 4 * 32
    # Without images only what the records themselves have wrong is seen.
    unseen = audit(source, None, decode_images=False)
    assert {data.damage[fault.index] for fault in unseen.skipped_samples} == {
        "malformed",
        "placeholders",
    }
    assert "lengths" not in summarize(unseen, None)


def test_what_is_cut_off(dataset: LlavaDataset, encoding: Encoding) -> None:
    lengths = audit(dataset.sources[0], encoding).lengths
    limit = int(np.sort(lengths)[15])
    short = Encoding(dataset.tokenizer, dataset.template, 4, limit)
    found = audit(dataset.sources[0], short)
    assert found.lengths.tolist() == lengths.tolist()  # whole, whatever the limit
    summary = summarize(found, short)["lengths"]
    assert summary["beyond_sequence_length"] == (lengths > limit).mean() > 0
    assert (summary["min"], summary["max"]) == (lengths.min(), lengths.max())
    assert summary["median"] == np.sort(lengths)[11]
    # A limit in front of every answer leaves nothing to learn: training would leave all out.
    tiny = Encoding(dataset.tokenizer, dataset.template, 4, 6)
    assert len(audit(dataset.sources[0], tiny).skipped_samples) == 23
    assert summarize(audit(dataset.sources[0], tiny), tiny)["lengths"] is None


def test_the_table_has_a_row_per_source(dataset: LlavaDataset, encoding: Encoding) -> None:
    from rich.console import Console

    source = Source(dataset.sources[0].records, dataset.sources[0].images, name="numbers")
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table([summarize(audit(source, encoding), encoding)]))
    text = console.export_text()
    assert "numbers" in text and " 23 " in text and " 16 " in text


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([5, 5], 10, 1),
        ([6, 6], 10, 2),
        ([6, 4, 3, 3, 4], 10, 2),
        ([3] * 7, 10, 3),
        ([20, 1], 10, 2),  # cut at the capacity
        ([0, 4, 0], 10, 1),  # records that cannot be used
        ([7, 7, 3, 2, 1], 10, 2),
        ([], 10, 0),
    ],
)
def test_rows_by_hand(lengths: list[int], capacity: int, rows: int) -> None:
    assert rows_needed(np.array(lengths, dtype=np.int32), capacity) == rows


def test_rows_are_near_the_bound() -> None:
    lengths = np.random.default_rng(0).integers(20, 2000, 20_000).astype(np.int32)
    bound = -(-int(lengths.sum()) // 4096)
    assert bound <= rows_needed(lengths, 4096) <= 1.01 * bound


def key_of(records: Path, tokenizer: Path, **changes: object) -> LengthKey:
    values = {"image_token": "<image>", "template": "phi3", "num_image_tokens": 4, **changes}
    return LengthKey.of(records, tokenizer=tokenizer, **values)  # type: ignore[arg-type]


def test_kept_lengths_are_never_stale(corpus: Path, phi3_model: Path, llama3_folder: Path) -> None:
    records = corpus / "records.jsonl"
    key = key_of(records, phi3_model)
    lengths = np.arange(23, dtype=np.int32)
    path = write_lengths(records, key, lengths)
    assert path.name == "records.jsonl.lengths.npy"
    assert read_lengths(records, key).tolist() == lengths.tolist()
    assert sorted(p.name for p in corpus.glob("records.jsonl*")) == [
        "records.jsonl",
        "records.jsonl.lengths.json",
        "records.jsonl.lengths.npy",
    ]
    with pytest.raises(ValueError, match=r"stale \(template was phi3, now it is llama3\)"):
        read_lengths(records, key_of(records, phi3_model, template="llama3"))
    with pytest.raises(ValueError, match=r"stale \(num_image_tokens was 4, now it is 729\)"):
        read_lengths(records, key_of(records, phi3_model, num_image_tokens=729))
    with pytest.raises(ValueError, match=r"stale \(tokenizer was "):
        read_lengths(records, key_of(records, llama3_folder))
    with records.open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"stale \(records_bytes was "):
        read_lengths(records, key_of(records, phi3_model))


def test_lengths_elsewhere_and_nowhere(corpus: Path, phi3_model: Path, tmp_path: Path) -> None:
    records = corpus / "records.jsonl"
    key, out = key_of(records, phi3_model), tmp_path / "new" / "folder"
    write_lengths(records, key, np.ones(23, np.int32), out)
    assert len(read_lengths(records, key, out)) == 23
    with pytest.raises(ValueError, match="There is no length index .*prepare_data.py lengths"):
        read_lengths(records, key)
    write_lengths(records, key, np.ones(5, np.int32), out / "other")
    os.replace(length_files(records, out / "other")[0], length_files(records, out)[0])
    with pytest.raises(ValueError, match="does not belong to"):
        read_lengths(records, key, out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write .*choose a folder with --out"):
        write_lengths(records, key, np.ones(5, np.int32), tmp_path / "file")
