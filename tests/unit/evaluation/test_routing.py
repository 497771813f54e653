"""Routing of a checkpoint on a data set: every real token once, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.checkpoint.directory import find_checkpoint
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.build import build_dataset
from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.evaluation.routing import _batch, measure_routing
from moiie_megatron.generation.checkpoint_config import checkpoint_config
from moiie_megatron.generation.generator import Generator
from moiie_megatron.layout.token_types import IMAGE, TEXT
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.moe.router import ModalityRouter
from tests.helpers.user_errors import user_error

SAMPLES = 5


@pytest.fixture(scope="module")
def config(run: Path) -> RunConfig:
    return checkpoint_config(find_checkpoint(run))


@pytest.fixture(scope="module")
def dataset(config: RunConfig) -> LlavaDataset:
    return build_dataset(config)


def measure(
    generator: Generator, dataset: Any, context: ParallelContext, config: RunConfig, batch: int = 2
) -> dict[str, Any]:
    train = config.train.model_copy(update={"micro_batch_size": batch})
    config = config.model_copy(update={"train": train})
    record = measure_routing(config, context, generator.model, dataset, SAMPLES)
    assert record is not None
    return record


def test_the_tokens_of_the_samples_are_counted(
    generator: Generator, dataset: LlavaDataset, context: ParallelContext, config: RunConfig
) -> None:
    types = torch.cat([dataset[index].encoded.token_types for index in range(SAMPLES)])
    record = measure(generator, dataset, context, config)
    assert (record["samples"], record["skipped_samples"]) == (SAMPLES, 0)
    for layer in record["layers"].values():
        assert layer["vision"]["tokens"] == (types == IMAGE).sum() > 0
        assert layer["text"]["tokens"] == (types == TEXT).sum() > 0
        for part in (layer["vision"], layer["text"]):
            assert sum(part["load"]) == 2 * part["tokens"]
            assert sum(part["prob"]) == pytest.approx(1.0, abs=1e-6)
        assert "steps" not in record
    # A second look counts afresh, and the batches change no choice.
    assert measure(generator, dataset, context, config, batch=3)["layers"].keys() == {"1", "3"}
    again = measure(generator, dataset, context, config, batch=SAMPLES)
    for number, layer in record["layers"].items():
        for modality in ("vision", "text"):
            assert again["layers"][number][modality]["load"] == layer[modality]["load"]
    routers = [m for m in generator.model.modules() if isinstance(m, ModalityRouter)]
    assert routers and not any(router.records_in_eval for router in routers)


def test_unreadable_samples_are_left_out(
    generator: Generator, dataset: LlavaDataset, context: ParallelContext, config: RunConfig
) -> None:
    class Damaged:
        """The data set, without some of its samples."""

        def __init__(self, bad: set[int]) -> None:
            self.bad = bad

        def __getattr__(self, name: str) -> Any:
            return getattr(dataset, name)

        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, index: int) -> Any:
            if index in self.bad:
                raise BadRecord("gone")
            return dataset[index]

    types = torch.cat([dataset[index].encoded.token_types for index in (0, 3, 4)])
    # A whole batch of two is gone.
    record = measure(generator, Damaged({1, 2}), context, config, batch=1)
    assert (record["samples"], record["skipped_samples"]) == (3, 2)
    assert record["layers"]["1"]["text"]["tokens"] == (types == TEXT).sum()
    with user_error("first 5 samples"):
        measure(generator, Damaged(set(range(SAMPLES))), context, config)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_pass_has_a_whole_micro_batch(
    dataset: LlavaDataset, config: RunConfig, number: int
) -> None:
    """The allgather dispatcher wants ranks with equally many tokens."""
    train = config.train.model_copy(update={"micro_batch_size": 2})
    batch = _batch(
        config.model_copy(update={"train": train}), dataset, [dataset[i] for i in range(number)]
    )
    assert len(batch.tokens) == 2


def test_a_dense_model_routes_nothing(
    generator: Generator, dataset: LlavaDataset, context: ParallelContext, config: RunConfig
) -> None:
    dense = config.model_copy(update={"stage": config.stage.model_copy(update={"moe": False})})
    with user_error("stage", "dense"):
        measure(generator, dataset, context, dense)
