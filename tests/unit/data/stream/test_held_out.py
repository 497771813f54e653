"""Held-out samples: each once, whatever the layout, and padding where samples are lacking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.build import build_encoding
from moiie_megatron.data.stream.held_out import (
    HeldOut,
    held_out_rounds,
    open_held_out,
    plan_rounds,
)
from moiie_megatron.data.stream.settings import LoaderSettings
from moiie_megatron.layout.token_types import PADDING
from tests.helpers.thread_ranks import on_ranks
from tests.helpers.tiny_run import tiny_values, write_config
from tests.helpers.user_errors import user_error


@pytest.fixture
def folder(digits: Path, tmp_path: Path) -> Path:
    """The digits as ``data``, and further files of records."""
    (tmp_path / "data").symlink_to(digits)
    lines = (digits / "test.jsonl").read_text().splitlines()
    broken = json.dumps(json.loads(lines[1]) | {"image": "gone.png"})
    (tmp_path / "broken.jsonl").write_text("\n".join([lines[0], broken, lines[2]]) + "\n")
    (tmp_path / "empty.jsonl").touch()
    return tmp_path


def config_of(folder: Path, names: list[str], **data: Any) -> RunConfig:
    values = tiny_values(folder, folder / "run")
    images = str(folder / "data" / "images")
    sources = [{"records": str(folder / name), "images": images} for name in names]
    values["data"] |= {"validation": {"sources": sources, "samples": 5}, **data}
    return load_config(write_config(folder / "run.yaml", values))


def open_samples(config: RunConfig) -> HeldOut:
    samples = open_held_out(config, build_encoding(config))
    assert samples is not None
    return samples


@pytest.mark.parametrize("total", [1, 7, 16, 17, 40])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("multiple_of", [1, 2])
def test_each_sample_is_in_one_micro_batch(total: int, dp_size: int, multiple_of: int) -> None:
    plans = [
        plan_rounds(total, LoaderSettings(0, 16, 2, rank, dp_size), multiple_of)
        for rank in range(dp_size)
    ]
    for rounds in zip(*plans, strict=True):
        (count,) = {len(own) for own in rounds}  # equally many on every rank
        assert 0 < count <= 16 // 2 // dp_size and count % multiple_of == 0
    # In the order of the samples: micro-batch j of rank r is number j * ranks + r.
    dealt = [
        number
        for rounds in zip(*plans, strict=True)
        for together in zip(*rounds, strict=True)
        for micro_batch in together
        for number in micro_batch
    ]
    assert dealt == list(range(len(dealt)))
    assert total <= len(dealt) < total + 2 * dp_size * multiple_of


def test_without_sources_there_is_nothing(folder: Path) -> None:
    config = config_of(folder, [])
    assert open_held_out(config, build_encoding(config)) is None


def test_the_first_samples_of_every_source(folder: Path) -> None:
    samples = open_samples(config_of(folder, ["data/test.jsonl", "broken.jsonl"]))
    assert samples.describe() == "8 samples: test 5 (the first of 13), broken 3"
    assert [samples.source_of(number) for number in range(8)] == [0] * 5 + [1] * 3
    assert [samples[number].record_id for number in range(9)] == [*"012345", "", "7", ""]
    (skipped,) = samples[6].skipped_samples
    assert (Path(skipped.file).name, skipped.index) == ("broken.jsonl", 1)
    assert "gone.png" in skipped.reason
    assert torch.equal(samples[5].encoded.tokens, samples[0].encoded.tokens)
    filler = samples[8]
    assert not filler.skipped_samples and not len(filler.images)
    assert (filler.encoded.token_types == PADDING).all()


def content(rounds: list[list[Batch]]) -> list[list[str]]:
    """The samples of every round, in the order of their numbers."""
    return [
        sorted(one for batch in batches for one in batch.record_ids if one) for batches in rounds
    ]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_layout_reads_the_same(folder: Path, packing: bool, workers: int) -> None:
    config = config_of(
        folder, ["data/test.jsonl", "data/train.jsonl"], packing=packing, num_workers=workers
    )
    samples = open_samples(config)

    def read(ranks: Any) -> list[list[Batch]]:
        return list(held_out_rounds(config, samples, ranks))

    (alone,) = on_ranks(1, read)
    assert content(alone) == [list("01234567"), list("89")]
    if workers:
        return  # threads of one process as ranks would share them
    parts = on_ranks(2, read)
    assert all([len(own) for own in part] == [len(own) for own in parts[0]] for part in parts)
    together = [sum(rounds, []) for rounds in zip(*parts, strict=True)]
    assert content(together) == content(alone)
    for batches in together:
        assert all(len(batch.tokens) == (1 if packing else 2) for batch in batches)
        assert all(batch.num_label_tokens for batch in batches)  # also of padding alone


def test_a_file_without_records(folder: Path) -> None:
    with user_error(folder / "empty.jsonl", "no records"):
        open_samples(config_of(folder, ["empty.jsonl"]))
