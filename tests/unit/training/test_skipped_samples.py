"""What is noticed about samples: each kind is logged once per source, and counted at the end."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.data.packing.pack import pack
from moiie_megatron.data.packing.rows import PackingSpec
from moiie_megatron.data.stream.batch import collate
from moiie_megatron.data.stream.example import Example, Notice
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.skipped_samples import SkippedSampleLog
from tests.parity import tiny
from tests.unit.data.stream.streams import example

FIRST, SECOND = Notice("a.json", "</s> in the text"), Notice("b.json", "</s> in the text")


def samples(*notices: Notice) -> list[Example]:
    plain = example([1, 99, 99, 5], [0, 1, 1, 0], 1, "a")
    return [replace(plain, skipped_samples=(), notices=(notice,)) for notice in notices]


def test_notices_are_logged_once_and_counted(
    context: ParallelContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.run_config(tiny.language("llama")).model_copy(update={"output": str(tmp_path)})
    log = SkippedSampleLog(config, context, Progress(0, 0))
    with caplog.at_level(logging.WARNING):
        for step, notices in enumerate([(FIRST,), (), (FIRST, SECOND, FIRST)]):
            batches = [collate([s], pad_id=0, num_image_tokens=2) for s in samples(*notices)]
            log.add(batches, step)
    assert caplog.messages == ["a.json: </s> in the text", "b.json: </s> in the text"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        log.close()
    assert caplog.messages == [
        "a.json: 3 samples: </s> in the text",
        "b.json: 1 samples: </s> in the text",
    ]
    assert log.count == 0


def test_packed_rows_keep_notices() -> None:
    spec = PackingSpec(capacity=8, sequence_length=8, num_image_tokens=2, pad_id=0)
    rows = pack(samples(FIRST, SECOND), spec)
    assert [row.notices for row in rows] == [(FIRST, SECOND)]
