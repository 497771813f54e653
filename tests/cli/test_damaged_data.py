"""A run over data of which a tenth is broken ends, names exactly that, and loses nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.damaged_data import DAMAGES, DamagedData, write_damaged
from tests.helpers.launch import Finished, command, run
from tests.helpers.tiny_run import read_metrics, tiny_values, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SAMPLES, BAD, GLOBAL = 1000, 100, 40
STEPS = SAMPLES // GLOBAL


def read_faults(output: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (output / "skipped_samples.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DamagedData:
    return write_damaged(tmp_path_factory.mktemp("thousand") / "data", SAMPLES, BAD)


def values_of(data: DamagedData, digits: Path, output: Path) -> dict[str, Any]:
    """One epoch of a dense model that is as small as they get."""
    values = tiny_values(digits, output, "dense")
    values["language"] |= {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 32}
    values["language"] |= {"num_attention_heads": 2, "num_query_groups": 2}
    values["vision"] |= {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 16}
    values["vision"] |= {"num_attention_heads": 2, "image_size": 14}
    values["data"]["sources"] = [{"records": str(data.records), "images": str(data.images)}]
    values["data"] |= {"max_skipped_fraction": 0.2, "sequence_length": 96}
    values["train"] |= {"global_batch_size": GLOBAL, "micro_batch_size": 20, "epochs": 1}
    values["train"]["steps"] = None
    values["checkpoint"] = {"interval": 10, "keep": 10}
    return values


@pytest.fixture(scope="module")
def epoch(
    data: DamagedData, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Finished]:
    """The output folder of a whole epoch in one process; record_ids.txt says what was used."""
    folder = tmp_path_factory.mktemp("epoch")
    config = write_config(folder / "run.yaml", values_of(data, digits, folder / "run"))
    words = ["env", f"RECORD_IDS={folder / 'record_ids.txt'}"]
    finished = run([*words, *command("tests/cli/recording_train.py", [config])], timeout=200)
    return folder / "run", finished.check()


def test_exactly_the_broken_records_are_reported(
    epoch: tuple[Path, Finished], data: DamagedData
) -> None:
    output, finished = epoch
    skipped_samples = read_faults(output)
    assert sorted(fault["index"] for fault in skipped_samples) == sorted(data.damage)
    for fault in skipped_samples:
        assert fault["file"] == str(data.records)
        assert DAMAGES[data.damage[fault["index"]]] in fault["reason"]
        assert 1 <= fault["step"] <= STEPS
    assert finished.stdout.count("warning: skipped ") == BAD
    assert f"{SAMPLES} samples per epoch: records.jsonl {SAMPLES}" in finished.stdout


def test_every_good_record_is_used(epoch: tuple[Path, Finished], data: DamagedData) -> None:
    output, _ = epoch
    assert len(read_metrics(output)) == STEPS
    used = (output.parent / "record_ids.txt").read_text().split()
    assert len(used) == SAMPLES  # a replacement for every broken one
    assert set(used) == data.good_ids


def test_a_resumed_run_lists_the_same(epoch: tuple[Path, Finished], data: DamagedData) -> None:
    """As if it had been killed after step 23: the checkpoint is that of step 20."""
    output, _ = epoch
    whole, steps = read_faults(output), read_metrics(output)
    (output / "checkpoints" / "latest").write_text("step_0000020\n")
    kept = [json.dumps(fault) + "\n" for fault in whole if fault["step"] <= 23]
    (output / "skipped_samples.jsonl").write_text("".join(kept) + '{"step": 24, "fi')
    run(command("tools/train.py", [output.parent / "run.yaml"]), timeout=200).check()
    assert read_faults(output) == whole
    again = read_metrics(output)
    assert [line["skipped_samples"] for line in again] == [
        line["skipped_samples"] for line in steps
    ]
    assert again[-1]["skipped_samples"] >= BAD  # a replacement may be broken as well
    assert again[-1]["seconds"] != steps[-1]["seconds"]


def test_counted_over_all_ranks(
    epoch: tuple[Path, Finished], data: DamagedData, digits: Path, tmp_path: Path
) -> None:
    """Two data-parallel ranks read half each; together they report what one would, also where
    packing moves the samples to the other rank."""
    output, _ = epoch
    values = values_of(data, digits, tmp_path / "run")
    values["data"] |= {"num_workers": 1, "packing": True}
    config = write_config(tmp_path / "run.yaml", values)
    words = [config, "train.epochs=null", "train.steps=3"]
    run(command("tools/train.py", words, processes=2), timeout=200).check()
    steps, whole = read_metrics(tmp_path / "run"), read_metrics(output)[:3]
    for line, wanted in zip(steps, whole, strict=True):
        assert line["skipped_samples"] == wanted["skipped_samples"] > 0
        assert line["tokens"] == wanted["tokens"]
    # Of three steps and of an epoch, the learning rates differ from the first step on.
    assert steps[0]["lm_loss"] == pytest.approx(whole[0]["lm_loss"], rel=1e-4)
    first = [fault for fault in read_faults(output) if fault["step"] <= 3]

    def by_index(skipped_samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(skipped_samples, key=lambda fault: fault["index"])

    assert by_index(read_faults(tmp_path / "run")) == by_index(first)
