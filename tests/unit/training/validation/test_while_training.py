"""Runs that validate: the course of those that do not, the same steps after a stop, and the loss
that a checkpoint has afterwards."""

from __future__ import annotations

import json
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moiie_megatron.checkpoint.directory import find_checkpoint
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.build import build_encoding
from moiie_megatron.data.stream.held_out import open_held_out
from moiie_megatron.generation.checkpoint_config import checkpoint_config
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.training.loop import train
from moiie_megatron.training.stop import StopRequest
from moiie_megatron.training.validation.validator import Validator
from moiie_megatron.vlm.build import build_chunks
from tests.helpers.checkpoints import plain_tensors
from tests.helpers.tiny_run import read_metrics, read_routing, tiny_values, write_config
from tests.helpers.user_errors import user_error

STEPS = 5


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").symlink_to(digits)
    return folder


def make_config(
    folder: Path, name: str, *, steps: int = STEPS, validation: dict[str, Any] | None = None
) -> RunConfig:
    """A run of two layers with dropout."""
    values = tiny_values(folder, folder / name)
    values["language"] |= {"num_layers": 2}
    values["train"] |= {"steps": steps, "global_batch_size": 4}
    values["megatron"] = {"hidden_dropout": 0.1}
    values["checkpoint"] = {"interval": 4, "keep": 3}
    values["log"] = {"routing_interval": 2}
    if validation is not None:
        data = folder / "data"
        source = {"records": str(data / "train.jsonl"), "images": str(data / "images")}
        default = {"sources": [source], "samples": 3, "interval": 3, "at_start": True}
        values["data"]["validation"] = default | validation
    return load_config(write_config(folder / f"{name}.yaml", values))


@pytest.fixture(scope="module")
def validated(folder: Path, context: ParallelContext) -> RunConfig:
    """A run that has validated after steps 0, 3 and 5."""
    config = make_config(folder, "validated", validation={})
    start(config, context)
    return config


def start(config: RunConfig, context: ParallelContext, stop: StopRequest | None = None) -> Path:
    seed_everything(config.train.seed, context.groups)
    return train(config, context, stop)


def lines(config: RunConfig) -> list[dict[str, Any]]:
    text = (Path(config.output) / "validation.jsonl").read_text()
    return [json.loads(line) | {"seconds": 0} for line in text.splitlines()]


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    """Bit for bit: what is logged of training, and the last checkpoint."""
    times = ("seconds", "tokens_per_second", "tflops_per_rank", "data_wait_fraction")
    courses = [
        [{k: v for k, v in line.items() if k not in times} for line in read_metrics(Path(output))]
        for output in (one.output, other.output)
    ]
    assert courses[0] == courses[1] and len(courses[0]) == STEPS
    tensors = [plain_tensors(find_checkpoint(output)) for output in (one.output, other.output)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def test_the_run_is_that_without(
    folder: Path, validated: RunConfig, context: ParallelContext
) -> None:
    """Dropout draws the same numbers."""
    plain = make_config(folder, "plain")
    start(plain, context)
    assert_same_run(validated, plain)
    assert read_routing(Path(validated.output)) == read_routing(Path(plain.output))
    assert not (Path(plain.output) / "validation.jsonl").exists()


def test_the_loss_is_logged(validated: RunConfig) -> None:
    found = lines(validated)
    assert [line["step"] for line in found] == [0, 3, STEPS]
    assert len({line["loss"] for line in found}) == 3
    assert all(line["samples"] == 3 for line in found)
    assert list(found[0]["image_counts"]) == ["text_only", "one_image", "several_images"]
    board = EventAccumulator(str(Path(validated.output) / "tensorboard")).Reload()
    for tag, part in (
        ("validation/loss", lambda line: line),
        ("validation/source/train", lambda line: line["sources"]["train"]),
        ("validation/several_images", lambda line: line["image_counts"]["several_images"]),
    ):
        logged = {event.step: event.value for event in board.Scalars(tag)}
        assert logged == pytest.approx({line["step"]: part(line)["loss"] for line in found})


def test_a_checkpoint_has_the_loss_that_the_run_has_logged(
    validated: RunConfig, context: ParallelContext
) -> None:
    checkpoint = find_checkpoint(validated.output)
    config = checkpoint_config(checkpoint)
    samples = open_held_out(config, build_encoding(config))
    assert samples is not None
    model = build_chunks(config, context)
    load_weights(checkpoint, context, model)
    afterwards = Validator(config, context, samples).measure(model)
    assert afterwards is not None
    assert {"step": STEPS, **afterwards.to_json(), "seconds": 0} == lines(validated)[-1]


def interrupted(stop: StopRequest, number: int) -> Any:
    """``Validator.measure``, with a signal in the call of this number."""
    measure, calls = Validator.measure, count()

    def method(self: Validator, *words: Any, **options: Any) -> Any:
        if next(calls) == number:
            stop._note(signal.SIGTERM)
        return measure(self, *words, **options)

    return method


def test_a_stop_in_the_last_validation(
    folder: Path, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is over, and saved."""
    config = make_config(folder, "last", steps=1, validation={"at_start": False})
    stop = StopRequest()
    monkeypatch.setattr(Validator, "measure", interrupted(stop, number=0))
    assert start(config, context, stop).name == "step_0000001"
    assert stop.reason is None and not lines(config)


def test_a_stop_in_a_validation(
    folder: Path,
    validated: RunConfig,
    context: ParallelContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run is saved at once, and begins with this validation when it goes on; what it had
    logged after its checkpoint is dropped."""
    config, stop = make_config(folder, "stopped", validation={}), StopRequest()
    with monkeypatch.context() as patch:
        patch.setattr(Validator, "measure", interrupted(stop, number=1))
        last = start(config, context, stop)
    assert last.name == "step_0000003" and [one["step"] for one in lines(config)] == [0]
    # As if a kill had taken steps with it.
    with (Path(config.output) / "validation.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n')
    caplog.clear()
    with caplog.at_level("INFO"):
        start(config, context)
    assert lines(config) == lines(validated)
    assert_same_run(config, validated)
    messages = " ".join(caplog.messages)
    assert "validation every 3 steps on 3 samples: train 3 (the first of" in messages
    assert "validation of step 3 | loss" in messages


def test_held_out_data_that_cannot_be_read(
    folder: Path, context: ParallelContext, tmp_path: Path
) -> None:
    """The run stops after its checkpoint."""
    record = {"image": "gone.png", "conversations": [{"from": "human", "value": "<image>"}]}
    (tmp_path / "gone.jsonl").write_text(json.dumps(record) + "\n")
    source = {"records": str(tmp_path / "gone.jsonl"), "images": str(tmp_path)}
    validation = {"sources": [source], "at_start": False}
    config = make_config(folder, "gone", steps=1, validation=validation)
    with user_error("data.validation.sources.0 (gone)"):
        start(config, context)
    assert find_checkpoint(config.output).name == "step_0000001"
    assert not lines(config)
