"""Several sources as one dataset of encoded samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.dataset import LlavaDataset, Source
from moiie_megatron.data.stream.example import Notice
from tests.helpers.user_errors import user_error


def test_sources_are_concatenated(dataset: LlavaDataset, corpus: Path) -> None:
    source = dataset.sources[0]
    line = (corpus / "records.jsonl").read_text().split("\n")[1]
    (corpus / "one.json").write_text(f"[{line}]")
    one = Source(RecordFile(corpus / "one.json"), source.images)
    both = LlavaDataset([one, source, one], dataset.encoding)
    assert len(both) == 25
    assert [both[i].record_id for i in (0, 1, 23, 24)] == ["r1", "r0", "r22", "r1"]
    with pytest.raises(IndexError):
        both[25]
    with user_error("data.sources"):
        LlavaDataset([], dataset.encoding)
    half = (0.5, 0.5, 0.5)
    large = Source(one.records, ImageLoader(corpus / "images", 16, "pad", half))
    with user_error("image sizes", 8, 16):
        LlavaDataset([one, large], dataset.encoding)


def test_samples_carry_their_images(dataset: LlavaDataset) -> None:
    assert dataset[3].images.shape == (0, 3, 8, 8)  # text only
    pair = dataset[4].images
    assert pair.shape == (2, 3, 8, 8)
    assert pair[:, 0, 0, 0].tolist() == [40, 20]
    assert (dataset[4].encoded.token_types == 1).sum() == 8


def test_bad_samples_name_file_and_record(dataset: LlavaDataset, corpus: Path) -> None:
    (corpus / "images" / "5.png").unlink()
    with pytest.raises(BadRecord, match="5.png") as caught:
        dataset[5]
    assert (caught.value.file, caught.value.index) == (str(corpus / "records.jsonl"), 5)


def test_what_is_not_read_is_noticed(dataset: LlavaDataset, tmp_path: Path) -> None:
    (source, *_) = dataset.sources
    file = tmp_path / "wide.jsonl"
    file.write_text(json.dumps({**source.records.value(0), "width": 5}) + "\n")
    wide = Source(RecordFile(file), source.images, name="wide")
    both = LlavaDataset([source, wide], dataset.encoding)
    assert both[len(both) - 1].notices == (Notice("wide", "key 'width' is not read"),)
    assert both[0].notices == ()
