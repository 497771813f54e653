"""One process saves a tiny training state and loads it into a fresh one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moiie_megatron.checkpoint.parallel_io import write_in_turn
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.save_load import load_checkpoint, request_save
from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.vlm.build import build_model
from tests.helpers.tiny_run import tiny_values, write_config

RATES = {"vision": 1e-4, "connector": 3e-3, "language": 1e-3, "moe": 2e-3}


def make_config(folder: Path, **sections: Any) -> RunConfig:
    values = tiny_values(folder, folder / "run")
    values["language"] = {**values["language"], "num_layers": 2}
    values["stage"]["learning_rates"] = RATES
    return load_config(write_config(folder / "run.yaml", values | sections), [])


def make_state(config: RunConfig, context: ParallelContext, seed: int) -> TrainState:
    seed_everything(seed, context.groups)
    return prepare_training(config, context, build_model(config, context), steps=10)


def update(state: TrainState) -> None:
    for parameter in state.model.parameters():
        if parameter.requires_grad:
            parameter.main_grad.copy_(parameter.detach() * 0.5 + 0.01)
    state.optimizer.step_if(lambda: True)
    state.scheduler.step(1)


def save(folder: Path, context: ParallelContext, state: TrainState, step: int) -> Path:
    progress = Progress(step=step, consumed_samples=0)
    write_in_turn(request_save(folder, context, state.state_parts(), progress)).execute_sync()
    return folder


def settings(state: TrainState) -> list[dict[str, Any]]:
    without = ("params", "step")
    return [
        {key: value for key, value in group.items() if key not in without}
        for part in state.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
    ]


@pytest.mark.parametrize("distributed", [True, False])
def test_training_goes_on_bit_for_bit(
    distributed: bool, tmp_path: Path, context: ParallelContext
) -> None:
    """With learning rates that differ from part to part, and the same number of steps."""
    config = make_config(tmp_path, optimizer={"distributed": distributed})
    whole = make_state(config, context, 1)
    update(whole)
    update(whole)
    checkpoint = save(tmp_path / "step", context, whole, 2)
    resumed = make_state(config, context, 2)
    load_checkpoint(checkpoint, context, resumed.state_parts())
    assert len({group["max_lr"] for group in settings(resumed)}) == len(RATES)
    assert settings(resumed) == settings(whole)
    for state in (whole, resumed):
        update(state)
    theirs = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
