"""Checkpoints of Transformer Engine's modules and of local ones, read by either."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch

from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.checkpoint.save_load import load_checkpoint
from moiie_megatron.convert.export import export_checkpoint
from moiie_megatron.convert.hf.weights_source import WeightsSource
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.state import prepare_training
from moiie_megatron.training.step import StepResult
from tests.helpers.launch import run
from tests.te.runs import config_of, fresh_model, save, start, step
from tests.te.standin.install import VARIABLE

IMPLEMENTATIONS = ("local", "te")
MODELS = ("dense", "moe")
EVERY_PAIR = list(product(IMPLEMENTATIONS, IMPLEMENTATIONS, MODELS))
TOLERANCE = 1e-4  # between implementations; within one every bit is the same

Contexts = dict[str, ParallelContext]


@dataclass(frozen=True)
class Written:
    """A run of one implementation.

    Attributes:
        checkpoint: After its second step.
        third: Its third step, without an interruption.
    """

    checkpoint: Path
    third: StepResult


@pytest.fixture(scope="module")
def contexts(te: ParallelContext, local: ParallelContext) -> Contexts:
    return {"te": te, "local": local}


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, contexts: Contexts
) -> Callable[[str, str], Written]:
    """The run of an implementation and a model, made when first asked for."""
    runs: dict[tuple[str, str], Written] = {}

    def make(writer: str, model: str) -> Written:
        if (writer, model) not in runs:
            context = contexts[writer]
            state = start(model, context, 1)
            step(model, context, state)
            step(model, context, state)
            folder = tmp_path_factory.mktemp(f"{writer}-{model}") / "step"
            checkpoint = save(folder, model, context, state)
            runs[writer, model] = Written(checkpoint, step(model, context, state))
        return runs[writer, model]

    return make


@pytest.mark.parametrize(("writer", "reader", "model"), EVERY_PAIR)
def test_resume(
    writer: str,
    reader: str,
    model: str,
    contexts: Contexts,
    written: Callable[[str, str], Written],
) -> None:
    before = written(writer, model)
    context = contexts[reader]
    state = start(model, context, 2)
    load_checkpoint(before.checkpoint, context, state.state_parts())
    third = step(model, context, state)
    assert third.learning_rates == before.third.learning_rates
    for name in ("lm_loss", "grad_norm"):
        ours, theirs = getattr(third, name), getattr(before.third, name)
        assert ours == (theirs if writer == reader else pytest.approx(theirs, rel=TOLERANCE))


@pytest.mark.parametrize(("writer", "reader", "model"), EVERY_PAIR)
def test_start_from_weights_and_export(
    writer: str,
    reader: str,
    model: str,
    contexts: Contexts,
    written: Callable[[str, str], Written],
    tmp_path: Path,
) -> None:
    """``init_from``; what the reader saves exports to the same bits as what it read."""
    before = written(writer, model)
    context, config = contexts[reader], config_of(model)
    read = fresh_model(model, context, 2)
    load_weights(before.checkpoint, context, read)
    state = prepare_training(config, context, read, steps=10)
    again = tmp_path / "step"
    save(again, model, context, state)
    loss = step(model, context, state).lm_loss
    assert loss == pytest.approx(before.third.lm_loss, rel=TOLERANCE)
    exports = [
        WeightsSource(export_checkpoint(checkpoint, tmp_path / f"export{number}"))
        for number, checkpoint in enumerate((before.checkpoint, again))
    ]
    names = [source.names for source in exports]
    assert names[0] == names[1] and len(names[0]) > 30
    for name in names[0]:
        first, second = (source.get(name) for source in exports)
        assert torch.equal(first, second), name


@pytest.mark.parametrize(("writer", "reader"), product(IMPLEMENTATIONS, IMPLEMENTATIONS))
def test_upcycle(
    writer: str, reader: str, contexts: Contexts, written: Callable[[str, str], Written]
) -> None:
    """A model with experts starts from a dense checkpoint."""
    before = written(writer, "dense")
    context = contexts[reader]
    model = fresh_model("moe", context, 2)
    load_weights(before.checkpoint, context, model)
    state = prepare_training(config_of("moe"), context, model, steps=10)
    assert step("moe", context, state).lm_loss == pytest.approx(before.third.lm_loss, rel=TOLERANCE)


def test_optimizers_read_each_other(
    contexts: Contexts, written: Callable[[str, str], Written], tmp_path: Path
) -> None:
    """Transformer Engine's Adam, and torch's where Transformer Engine is missing."""
    run_here = written("local", "moe")
    # A process that does not see Transformer Engine.
    words = [*("env", "-u", VARIABLE, sys.executable, "tests/te/without_te.py")]
    run([*words, str(tmp_path), str(run_here.checkpoint)], timeout=200).check()
    there = json.loads((tmp_path / "losses.json").read_text())
    context = contexts["local"]
    state = start("moe", context, 2)
    load_checkpoint(tmp_path / "step", context, state.state_parts())
    third = step("moe", context, state)
    for name in ("lm_loss", "grad_norm"):
        expected = pytest.approx(there["third"][name], rel=TOLERANCE)
        assert getattr(run_here.third, name) == expected and there["resumed"][name] == expected
        assert getattr(third, name) == expected
    parts = state.optimizer.chained_optimizers
    assert {group["step"] for part in parts for group in part.param_groups} == {3}
