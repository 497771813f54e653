"""A tiny training state in one process: made, updated and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moiie_megatron.checkpoint.parallel_io import write_in_turn
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.save_load import request_save
from moiie_megatron.config.load import load_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.vlm.build import build_chunks
from tests.helpers.tiny_run import tiny_values, write_config

RATES = {"vision": 1e-4, "connector": 3e-3, "language": 1e-3, "moe": 2e-3}


def make_config(folder: Path, **sections: Any) -> RunConfig:
    values = tiny_values(folder, folder / "run")
    values["language"] = {**values["language"], "num_layers": 2}
    values["stage"]["learning_rates"] = RATES
    return load_config(write_config(folder / "run.yaml", values | sections), [])


def make_state(config: RunConfig, context: ParallelContext, seed: int) -> TrainState:
    seed_everything(seed, context.groups)
    return prepare_training(config, context, build_chunks(config, context), steps=10)


def update(state: TrainState) -> None:
    for parameter in state.model.parameters():
        if parameter.requires_grad:
            parameter.main_grad.copy_(parameter.detach() * 0.5 + 0.01)
    state.optimizer.step_if(lambda: True)
    state.scheduler.step(1)


def save(
    folder: Path, context: ParallelContext, state: TrainState, step: int, skipped_steps: int = 0
) -> Path:
    progress = Progress(step=step, consumed_samples=0, skipped_steps=skipped_steps)
    write_in_turn(request_save(folder, context, state.state_parts(), progress)).execute_sync()
    return folder
