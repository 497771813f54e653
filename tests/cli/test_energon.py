"""The energon back end: the same samples as the plain loader, exact resume, clear refusals."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
import tarfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.records.energon_index import index_shards
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.build import build_dataset, build_train_loader
from moiie_megatron.data.stream.stream_state import StreamState
from moiie_megatron.utils.errors import UserError
from tests.helpers.damaged_data import DAMAGES, DamagedData, write_damaged
from tests.helpers.launch import TRAIN, command, run
from tests.helpers.open_files import few_open_files
from tests.helpers.tiny_run import read_metrics, tiny_values, write_config
from tests.helpers.user_errors import assert_user_error, user_error

pytest.importorskip("megatron.energon", reason="the extra energon is not installed")
pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> DamagedData:
    return write_damaged(tmp_path_factory.mktemp("damaged") / "d", samples=160, bad=16)


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, damaged: DamagedData
) -> dict[str, Path]:
    """Two folders: good data, and data with broken pictures in it."""
    folder = tmp_path_factory.mktemp("shards")
    data = digits / "data"
    sets = {
        "good": (data / "train.jsonl", data / "images"),
        "broken": (damaged.records, damaged.images),
    }
    before = sys.argv
    for name, (records, images) in sets.items():
        words = ["--records", records, "--images", images, "--out", folder / name]
        words += ["--samples-per-shard", 30, "--max-skipped-fraction", 1]
        sys.argv = ["prepare_data.py", "webdataset", *map(str, words)]
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("tools/prepare_data.py", run_name="__main__")
        assert not ended.value.code
    sys.argv = before
    return {name: folder / name for name in sets}


def values_of(
    shards: dict[str, Path], digits: Path, output: Path, *names: str, workers: int = 0
) -> dict[str, Any]:
    values = tiny_values(digits, output)
    values["data"] |= {
        "loader": "energon",
        "num_workers": workers,
        "max_skipped_fraction": 0.3,
        "sources": [{"records": str(shards[name]), "name": name} for name in names],
    }
    return values


def load(tmp_path: Path, values: dict[str, Any]) -> RunConfig:
    return load_config(write_config(tmp_path / "run.yaml", values))


def steps(
    config: RunConfig, state: StreamState, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[list[Batch]]:
    return build_train_loader(
        config,
        build_dataset(config),
        consumed_samples=0,
        dp_rank=dp_rank,
        dp_size=dp_size,
        state=state,
    )


def take(stream: Iterator[list[Batch]], count: int) -> list[list[Batch]]:
    return [next(stream) for _ in range(count)]


def assert_same(got: list[list[Batch]], expected: list[list[Batch]]) -> None:
    for a, b in zip(sum(got, []), sum(expected, []), strict=True):
        assert (a.record_ids, a.skipped_samples) == (b.record_ids, b.skipped_samples)
        for name in ("tokens", "labels", "position_ids", "token_types", "images"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_samples_are_those_of_the_plain_loader(
    shards: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    config = load(tmp_path, values_of(shards, digits, tmp_path / "run", "good"))
    plain = build_dataset(load(tmp_path, tiny_values(digits, tmp_path / "run")))
    examples = {plain[i].record_id: plain[i] for i in range(len(plain))}
    dataset = build_dataset(config)
    assert dataset.blend.counts == (71,)
    assert dataset.describe_epoch().startswith("71 samples per epoch: good 71")
    seen = set()
    for batch in sum(take(steps(config, StreamState()), 30), []):
        assert batch.tokens.shape[0] == 2 and not batch.skipped_samples
        images = 0
        for row, name in enumerate(batch.record_ids):
            example = examples[name]
            n = len(example.encoded.tokens)
            assert torch.equal(batch.tokens[row, :n], example.encoded.tokens)
            assert torch.equal(batch.labels[row, :n], example.encoded.labels)
            assert torch.equal(batch.images[images : images + len(example.images)], example.images)
            images += len(example.images)
            seen.add(name)
    # Not all: a sample may wait in the shuffle buffer while others come again.
    assert seen <= set(examples) and len(seen) > 60


@pytest.mark.parametrize("packing", [False, True])
def test_all_micro_batches_of_a_step_are_held(
    packing: bool, shards: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    """Without an open file for each tensor."""
    values = values_of(shards, digits, tmp_path / "run", "good", workers=2)
    values["data"]["packing"] = packing
    values["train"] |= {"global_batch_size": 128, "micro_batch_size": 1}
    config = load(tmp_path, values)
    with few_open_files(100):
        (step,) = take(steps(config, StreamState()), 1)
    assert sum(len(batch.record_ids) for batch in step) == 128
    assert packing or len(step) == 128


def test_an_epoch_is_the_training_part(
    shards: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(shards["good"], tmp_path / "good")
    split = folder / ".nv-meta" / "split.yaml"
    parts = yaml.safe_load(split.read_text())
    parts["split_parts"] = {"train": ["shard_00000.tar"], "val": ["shard_00001.tar"], "test": []}
    split.write_text(yaml.safe_dump(parts))
    values = values_of({"good": folder}, digits, tmp_path / "run", "good")
    assert build_dataset(load(tmp_path, values)).blend.sizes == (30,)


@pytest.mark.parametrize(
    ("workers", "packing"), [(0, False), (2, False), (2, True)], ids=["0", "2", "2-packed"]
)
def test_goes_on_exactly(
    shards: dict[str, Path], digits: Path, tmp_path: Path, workers: int, packing: bool
) -> None:
    values = values_of(shards, digits, tmp_path / "run", "good", "broken", workers=workers)
    values["data"]["packing"] = packing
    config = load(tmp_path, values)
    state = StreamState()
    stream = steps(config, state)
    take(stream, 4)
    saved = state.tensor()
    rest = take(stream, 4)
    again = StreamState()
    again.restore(saved)
    assert_same(take(steps(config, again), 4), rest)


def test_a_state_runs_nothing(shards: dict[str, Path], digits: Path, tmp_path: Path) -> None:
    """A checkpoint from anywhere may hold any bytes in its place."""
    hostile = b"cos\nmkdir\n(V" + bytes(tmp_path / "ran") + b"\ntR."
    state = StreamState()
    state.restore(torch.frombuffer(bytearray(hostile), dtype=torch.uint8))
    config = load(tmp_path, values_of(shards, digits, tmp_path / "run", "good"))
    with user_error("energon's state in the checkpoint", "os.mkdir"):
        take(steps(config, state), 1)
    assert not (tmp_path / "ran").exists()


def test_a_dot_in_the_name_of_a_sample(
    shards: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    """All readers of the format end the name at the first one."""
    folder = tmp_path / "dots"
    folder.mkdir()
    with tarfile.open(folder / "shard_00000.tar", "w") as tar:
        for number in range(120):
            content = b'{"conversations": []}'
            header = tarfile.TarInfo(f"train{number}.000017.json")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    assert index_shards(folder, ["shard_00000.tar"])
    values = values_of({"dots": folder}, digits, tmp_path / "run", "dots")
    with user_error(".000017.json but no train", "first dot"):
        take(steps(load(tmp_path, values), StreamState()), 1)


def test_ranks_have_different_samples(
    shards: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    config = load(tmp_path, values_of(shards, digits, tmp_path / "run", "good"))
    both = [take(steps(config, StreamState(), rank, 2), 7) for rank in range(2)]
    ids = [{name for batch in sum(part, []) for name in batch.record_ids} for part in both]
    assert all(len(part) > 15 for part in ids) and not ids[0] & ids[1]


def test_broken_samples_are_named(
    shards: dict[str, Path], digits: Path, damaged: DamagedData, tmp_path: Path
) -> None:
    values = values_of(shards, digits, tmp_path / "run", "broken", workers=1)
    batches = sum(take(steps(load(tmp_path, values), StreamState()), 40), [])
    skipped_samples = {one.index: one for batch in batches for one in batch.skipped_samples}
    # Missing pictures and malformed records were skipped when the shards were made.
    kinds = {"truncated", "empty", "bomb"}
    assert set(skipped_samples) == {i for i, kind in damaged.damage.items() if kind in kinds}
    for index, skipped in skipped_samples.items():
        assert DAMAGES[damaged.damage[index]] in skipped.reason
        assert skipped.file.startswith(f"{shards['broken']}/shard_0")
    names = {name for batch in batches for name in batch.record_ids}
    assert names <= damaged.good_ids and len(names) > 100


def test_nothing_usable_ends_in_a_sentence(
    shards: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    values = values_of(shards, digits, tmp_path / "run", "broken", workers=1)
    values["data"]["sequence_length"] = 18  # the image fits, no answer does
    values["stage"]["template"] = "phi3"
    with user_error("too many samples", "last: "):
        take(steps(load(tmp_path, values), StreamState()), 1)
    values["data"]["sources"] = [{"records": str(digits / "data")}]
    with user_error(digits / "data", "energon prepare"):
        build_dataset(load(tmp_path, values))


def test_shards_of_megatrons_llava_example(digits: Path, tmp_path: Path) -> None:
    """KEY.jpg, and KEY.json with a list of turns; prepared as VQASample they are refused."""
    output = tmp_path / "llava"
    output.mkdir()
    record = json.loads((digits / "data" / "train.jsonl").read_text().splitlines()[0])
    picture = (digits / "data" / "images" / record["image"]).read_bytes()
    with tarfile.open(output / "0.tar", "w") as tar:
        for key in range(8):
            turns = json.dumps(record["conversations"]).encode()
            for name, content in ((f"{key}.json", turns), (f"{key}.jpg", picture)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index_shards(output, ["0.tar"])
    shards = {"llava": output}
    config = load(tmp_path, values_of(shards, digits, tmp_path / "run", "llava"))
    (batches,) = take(steps(config, StreamState()), 1)
    assert all(len(batch.images) == len(batch.record_ids) for batch in batches)
    assert not any(batch.skipped_samples for batch in batches)
    kind = output / ".nv-meta" / "dataset.yaml"
    kind.write_text(kind.read_text().replace("CrudeWebdataset", "VQASample"))
    with user_error(output, "VQASample", "energon prepare", "CrudeWebdataset"):
        build_dataset(config)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [ValueError, NameError])
def test_a_bug_is_no_bad_sample(
    error: type[Exception],
    workers: int,
    shards: dict[str, Path],
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Energon would go on with the next sample, or end without a word of where it was."""

    def encode(*_: Any) -> Any:
        raise error("planted")

    monkeypatch.setattr(Encoding, "encode", encode)
    values = values_of(shards, digits, tmp_path / "run", "good", workers=workers)
    with pytest.raises(Exception, match="planted") as caught:
        take(steps(load(tmp_path, values), StreamState()), 1)
    assert not isinstance(caught.value, UserError)
    text = "".join(traceback.format_exception(caught.value))
    assert f'{__file__}", line' in text and ", in encode_sample" in text


@pytest.mark.distributed
def test_training_resumes_from_the_checkpoint(
    shards: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    """The second time it validates, on plain records: training does not notice."""
    output = tmp_path / "run"
    values = values_of(shards, digits, output, "good", "broken", workers=1)
    values["train"] |= {"steps": 6}
    values["checkpoint"] = {"interval": 3, "keep": 5}
    words = [write_config(tmp_path / "run.yaml", values)]
    run(command(TRAIN, words, processes=2), timeout=200).check()
    whole = read_metrics(output)
    (output / "checkpoints" / "latest").write_text("step_0000003\n")
    data = digits / "data"
    held_out = f"[{{records: {data / 'test.jsonl'}, images: {data / 'images'}}}]"
    validation = {"sources": held_out, "samples": 3, "interval": 3}
    more = [f"data.validation.{key}={value}" for key, value in validation.items()]
    run(command(TRAIN, [*words, *more], processes=2), timeout=200).check()
    validated = (output / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in validated] == [3, 6]
    again = read_metrics(output)
    for key in ("step", "lm_loss", "grad_norm", "tokens", "skipped_samples"):
        assert [line[key] for line in again] == [line[key] for line in whole], key
    assert again[-1]["seconds"] != whole[-1]["seconds"]
    (output / "checkpoints" / "latest").write_text("step_0000003\n")
    refused = run(command(TRAIN, [*words, "data.num_workers=2"]), timeout=100)
    assert_user_error(refused, output, "data-parallel ranks is 1", "with 2", "restore it")
