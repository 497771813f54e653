"""Shards hold what the records and the image folder hold, bit by bit."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from moiie_megatron.data.records.webdataset import write_shards
from moiie_megatron.data.stream.dataset import LlavaDataset
from tests.helpers.user_errors import user_error


def members(folder: Path, names: list[str]) -> list[dict[str, bytes]]:
    """Name to content, by shard."""
    found = []
    for name in names:
        with tarfile.open(folder / name) as tar:
            files = {member.name: tar.extractfile(member) for member in tar}
            found.append({key: file.read() for key, file in files.items() if file is not None})
    return found


def test_records_and_images(dataset: LlavaDataset, corpus: Path, tmp_path: Path) -> None:
    source = dataset.sources[0]
    out = tmp_path / "shards"
    out.mkdir()
    names, skipped_samples = write_shards(source, out, samples_per_shard=10)
    assert names == ["shard_00000.tar", "shard_00001.tar", "shard_00002.tar"]
    assert skipped_samples == ()
    shards = members(out, names)
    assert [sum(name.endswith(".json") for name in shard) for shard in shards] == [10, 10, 3]
    assert list(shards[0])[:4] == [
        "000000000.json", "000000001.json", "000000001.png", "000000002.json",
    ]  # fmt: skip
    assert json.loads(shards[1]["000000013.json"]) == source.records.value(13)
    picture = (corpus / "images" / "4.png").read_bytes()
    assert shards[0]["000000004.0.png"] == picture
    assert shards[0]["000000004.1.png"] == (corpus / "images" / "2.png").read_bytes()
    again = tmp_path / "again"
    again.mkdir()
    write_shards(source, again, samples_per_shard=10)
    assert all((out / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_what_cannot_be_used_is_skipped(
    dataset: LlavaDataset, corpus: Path, tmp_path: Path
) -> None:
    source = dataset.sources[0]
    out = tmp_path / "shards"
    out.mkdir()
    (corpus / "images" / "5.png").unlink()
    names, skipped_samples = write_shards(source, out)
    (skipped,) = skipped_samples
    assert skipped.index == 5 and "5.png" in skipped.reason
    assert "000000005.json" not in members(out, names)[0]
    path = corpus / "records.jsonl"
    path.write_bytes(b"\0" * path.stat().st_size)
    with user_error(path, "None of the 23 records"):
        write_shards(source, out)
