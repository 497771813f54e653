"""The loss on held-out samples: that of each sample alone, added up, and nothing else changes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.checkpoint.directory import find_checkpoint
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.encode.encoder import IGNORE
from moiie_megatron.data.stream.batch import collate
from moiie_megatron.data.stream.build import build_encoding
from moiie_megatron.data.stream.held_out import HeldOut, open_held_out
from moiie_megatron.generation.checkpoint_config import checkpoint_config
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.step import evaluate_loss
from moiie_megatron.training.validation.result import GroupSums, Validation
from moiie_megatron.training.validation.validator import Validator
from moiie_megatron.vlm.build import build_chunks
from moiie_megatron.vlm.chunks import ModelChunks
from tests.helpers.user_errors import user_error

SAMPLES = 5  # of each source


@pytest.fixture(scope="module")
def model(run: Path, context: ParallelContext) -> ModelChunks:
    checkpoint = find_checkpoint(run)
    chunks = build_chunks(checkpoint_config(checkpoint), context)
    load_weights(checkpoint, context, chunks)
    return chunks.train()


def config_of(run: Path, digits: Path, files: list[Path], *words: str) -> RunConfig:
    images = str(digits / "images")
    sources = [{"records": str(file), "images": images} for file in files]
    overrides = [
        f"data.validation.sources={json.dumps(sources)}",
        f"data.validation.samples={SAMPLES}",
        "data.num_workers=0",
        "train.global_batch_size=6",
        *words,
    ]
    return checkpoint_config(find_checkpoint(run), overrides)


def open_samples(config: RunConfig) -> HeldOut:
    samples = open_held_out(config, build_encoding(config))
    assert samples is not None
    return samples


def measure(
    config: RunConfig, context: ParallelContext, model: ModelChunks, **options: Any
) -> Validation | None:
    return Validator(config, context, open_samples(config)).measure(model, **options)


@pytest.mark.parametrize("packing", ["false", "true"])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_loss_is_that_of_each_sample_alone(
    packing: str,
    micro_batch_size: int,
    run: Path,
    digits: Path,
    context: ParallelContext,
    model: ModelChunks,
) -> None:
    """Ten samples in rounds of six: the last one is filled up."""
    config = config_of(
        run,
        digits,
        [digits / "train.jsonl", digits / "test.jsonl"],
        f"data.packing={packing}",
        f"train.micro_batch_size={micro_batch_size}",
    )
    samples = open_samples(config)
    wanted: dict[str, list[GroupSums]] = {name: [GroupSums()] * 3 for name in ("train", "test")}
    plain = config_of(run, digits, [digits / "test.jsonl"], "train.micro_batch_size=1")
    for number in range(2 * SAMPLES):
        example = samples[number]
        batch = collate(
            [example],
            pad_id=samples.dataset.pad_id,
            num_image_tokens=samples.dataset.num_image_tokens,
        )
        labels = int((example.encoded.labels != IGNORE).sum())
        one = GroupSums(
            evaluate_loss(plain, context, model, [batch]) * labels,
            1,
            labels,
            len(example.encoded.tokens),
            len(example.images) * samples.dataset.num_image_tokens,
        )
        parts = wanted["train" if number < SAMPLES else "test"]
        parts[min(len(example.images), 2)] += one
    assert all(part.samples for part in wanted["train"])  # none, one and several images

    result = measure(config, context, model)

    assert result is not None
    for name, parts in wanted.items():
        for found, want in zip(result.by_source[name], parts, strict=True):
            assert found.loss_sum == pytest.approx(want.loss_sum, rel=1e-5)
            assert vars(found) | {"loss_sum": 0} == vars(want) | {"loss_sum": 0}


def test_a_model_in_training_does_not_notice(
    run: Path, digits: Path, context: ParallelContext
) -> None:
    """Also one with dropout, whose passes in training draw random numbers."""
    config = config_of(run, digits, [digits / "train.jsonl"], "megatron.hidden_dropout=0.5")
    model = build_chunks(config, context).train()

    def state() -> dict[str, torch.Tensor]:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, module in model.named_modules():
            stats = getattr(module, "stats", None)
            found = {} if stats is None else vars(stats)
            tensors |= {f"{name}.{k}": v for k, v in found.items() if torch.is_tensor(v)}
        return {name: tensor.clone() for name, tensor in tensors.items()} | {
            "rng": torch.get_rng_state()
        }

    before = state()
    assert len(before) > 50
    first, second = (measure(config, context, model) for _ in range(2))
    after = state()
    assert first == second and first is not None
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_request_to_stop_ends_it(
    run: Path, digits: Path, context: ParallelContext, model: ModelChunks
) -> None:
    """After a round: the sums of its flags come with those of the losses."""
    config = config_of(run, digits, [digits / "train.jsonl", digits / "test.jsonl"])
    seen: list[list[float]] = []
    done: list[tuple[int, int]] = []

    def is_stopped(flags: list[float]) -> bool:
        seen.append(flags)
        return len(seen) == 2

    options: dict[str, Any] = {
        "stop_flags": lambda: [0.0, 3.0],
        "progress": lambda *numbers: done.append(numbers),
    }
    assert measure(config, context, model, is_stopped=is_stopped, **options) is None
    assert seen == [[0.0, 3.0]] * 2 and done == [(6, 10)]


def test_samples_that_cannot_be_read(
    run: Path,
    digits: Path,
    context: ParallelContext,
    model: ModelChunks,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are left out and named once; too many of them, or none but them, are an error."""
    lines = [json.loads(line) for line in (digits / "test.jsonl").read_text().splitlines()]
    whole, holed, gone = (tmp_path / f"{name}.jsonl" for name in ("whole", "holed", "gone"))
    broken = [line | {"image": "gone.png"} for line in lines]
    for file, records in (
        (whole, [lines[0], lines[2]]),
        (holed, [lines[0], broken[1], lines[2]]),
        (gone, broken[:2]),
    ):
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = config_of(run, digits, [holed])
    validator = Validator(config, context, open_samples(config))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            result = validator.measure(model)
            assert result is not None
            validator.check(result)
    (message,) = caplog.messages
    assert f"{holed}[1]" in message and "gone.png" in message
    assert len(result.skipped) == 1 and result.total.samples == 2
    alone = measure(config_of(run, digits, [whole]), context, model)
    assert alone is not None
    assert result.total.loss == pytest.approx(alone.total.loss, rel=1e-6)

    for files, words, parts in (
        ([holed], ["data.max_skipped_fraction=0"], ["1 of 3", "data.max_skipped_fraction"]),
        ([holed, gone], [], ["data.validation.sources.1 (gone)", "gone.png"]),
    ):
        config = config_of(run, digits, files, *words)
        validator = Validator(config, context, open_samples(config))
        result = validator.measure(model)
        assert result is not None
        with user_error(*parts):
            validator.check(result)
