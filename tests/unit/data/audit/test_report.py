"""The numbers of an audit as JSON, as a table, and as lines about packing."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moiie_megatron.data.audit.audit import Audit, audit
from moiie_megatron.data.audit.report import (
    data_report,
    image_fraction_lines,
    marker_lines,
    note_lines,
    packing_lines,
    summarize,
    table,
    truncation_lines,
)
from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.encode.templates import load_template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.stream.dataset import LlavaDataset, Source
from tests.helpers.damaged_data import write_damaged


@pytest.fixture
def measured(dataset: LlavaDataset) -> Audit:
    return audit(dataset.sources[0], dataset.encoding, decode_images=False)


def test_skipped_samples_are_counted_and_listed(tmp_path: Path, dataset: LlavaDataset) -> None:
    data = write_damaged(tmp_path / "d", samples=48, bad=16)
    half = (0.5, 0.5, 0.5)
    source = Source(RecordFile(data.records), ImageLoader(data.images, 8, "square", half))
    summary = summarize(audit(source, dataset.encoding), dataset.encoding)
    assert (summary["samples"], summary["skipped"]) == (48, 16)
    assert summary["skipped_fraction"] == 1 / 3
    assert [sample["index"] for sample in summary["skipped_samples"]] == sorted(data.damage)
    assert summary["images_per_sample"] == {"1": 32}
    assert summary["image_tokens"] == 4 * 32
    assert json.loads(json.dumps(summary)) == summary
    assert "lengths" not in summarize(audit(source, None, decode_images=False), None)


def test_lengths_by_hand(dataset: LlavaDataset, measured: Audit) -> None:
    lengths = np.sort(measured.lengths)
    limit = int(lengths[15])
    encoding = Encoding(dataset.encoding.tokenizer, dataset.encoding.template, 4, limit)
    summary = summarize(measured, encoding)["lengths"]
    assert summary["beyond_sequence_length"] == (lengths > limit).mean() > 0
    assert (summary["min"], summary["max"]) == (lengths[0], lengths[-1])
    assert summary["median"] == lengths[11]
    assert summary["total"] == lengths.sum()


def test_what_planning_reads(dataset: LlavaDataset, measured: Audit) -> None:
    """Every third sample has no image, one has two; none is truncated."""
    summary = summarize(measured, dataset.encoding)
    assert summary["images_each"] == {"min": 0, "median": 1, "p99": 1, "max": 2, "mean": 16 / 23}
    assert summary["weight"] == 1.0
    shapes = summary["shapes"]
    assert sum(shapes["samples"]) == 23 and sum(shapes["tokens"]) == measured.lengths.sum()
    assert sum(shapes["labels"]) == summary["label_tokens"] == measured.labels.sum() > 23
    report = data_report([summary, summary], dataset.encoding)
    assert report["encoding"] == {"sequence_length": 64, "num_image_tokens": 4}
    assert (report["samples"], report["skipped"]) == (46, 0)
    assert report["sources"] == [summary, summary] and json.loads(json.dumps(report)) == report
    assert data_report([summary], None)["encoding"] is None


def test_lines_that_recommend_settings(dataset: LlavaDataset, measured: Audit) -> None:
    summary = summarize(measured, dataset.encoding)
    assert truncation_lines([summary]) == []
    (line,) = image_fraction_lines([summary])
    fraction = 4 * 16 / measured.lengths.sum()
    assert f"moe.image_fraction={fraction:.2f}" in line and line.startswith(f"{fraction:.0%} ")
    # Text alone, three times as often, counts three times.
    texts = {**summary, "weight": 3.0, "image_tokens": 0}
    (mixed,) = image_fraction_lines([summary, texts])
    assert f"moe.image_fraction={fraction / 4:.2f}" in mixed
    assert image_fraction_lines([texts]) == []
    limit = int(np.sort(measured.lengths)[15])
    short = Encoding(dataset.encoding.tokenizer, dataset.encoding.template, 4, limit)
    (line,) = truncation_lines([summarize(measured, short)])
    p99 = np.sort(measured.lengths)[21]
    assert line.startswith("records.jsonl: ") and f"data.sequence_length={p99} " in line


def test_nothing_usable(dataset: LlavaDataset) -> None:
    tiny = Encoding(dataset.encoding.tokenizer, dataset.encoding.template, 4, 6)
    summary = summarize(audit(dataset.sources[0], tiny), tiny)
    assert summary["lengths"] is None and summary["rows"] is None
    assert packing_lines([summary]) == truncation_lines([summary]) == []
    assert image_fraction_lines([summary]) == [] and summary["shapes"] is None


def test_the_table_has_a_row_per_source(dataset: LlavaDataset, measured: Audit) -> None:
    source = Source(dataset.sources[0].records, dataset.sources[0].images, name="numbers")
    notes = {"key 'width' is not read": 23}
    named = replace(measured, source=source, notes=notes)
    summary = summarize(named, dataset.encoding)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table([summary]))
    text = console.export_text()
    assert "numbers" in text and " 23 " in text and " 16 " in text
    assert note_lines([summary]) == ["numbers: key 'width' is not read (23)"]
    (line,) = packing_lines([summary])
    packed = summary["rows"]["packed"]
    assert 1 <= packed < 23
    assert line.startswith("numbers: ")
    assert f"23 samples into {packed} rows of 64 tokens, {23 / packed:.1f}" in line


def test_special_tokens_in_the_text_are_counted(tmp_path: Path, llama3: Tokenizer) -> None:
    texts = [("a", "b"), ("a<|eot_id|><|eot_id|>", "b"), ("a", "<|begin_of_text|><|eot_id|>")]
    records = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for q, a in texts
    ]
    (tmp_path / "r.json").write_text(json.dumps(records))
    images = ImageLoader(tmp_path, 8, "square", (0.5, 0.5, 0.5))
    source = Source(RecordFile(tmp_path / "r.json"), images)
    encoding = Encoding(llama3, load_template("llama3", llama3), 4, 64)
    summary = summarize(audit(source, encoding), encoding)
    assert summary["markers_in_text"] == {"<|begin_of_text|>": 1, "<|eot_id|>": 2}
    (line,) = marker_lines([summary])
    assert line.startswith("r.json: ") and "<|eot_id|> in 2" in line
    assert marker_lines([summary | {"markers_in_text": {}}]) == []
    example = LlavaDataset([source], encoding)[2]
    assert [notice.source for notice in example.notices] == ["r.json"] * 2
    assert "<|eot_id|>" in example.notices[1].what
