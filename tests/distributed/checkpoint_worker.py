"""One rank of test_checkpoint_shards.py: a checkpoint goes through several layouts in turn."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from moiie_megatron.checkpoint.parallel_io import write_in_turn
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.save_load import load_checkpoint, request_save
from moiie_megatron.config.load import load_config
from moiie_megatron.mcore.parallel import DistEnv, ParallelContext, destroy_parallel, init_parallel
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.vlm.build import build_chunks


def build(config_file: Path, overrides: list[str], launch: DistEnv, seed: int) -> Any:
    """Context and training state of a layout; layouts of one seed have the same weights or not."""
    config = load_config(config_file, overrides)
    context = init_parallel(config.active_parallel, launch, device="cpu", seed=seed)
    model = build_chunks(config, context)
    return context, prepare_training(config, context, model, steps=10)


def update(state: TrainState) -> None:
    """Two steps along gradients that depend on the weights alone, as all layouts would see them."""
    for factor in (0.5, 0.25):
        for parameter in state.model.parameters():
            if parameter.requires_grad:
                parameter.main_grad.copy_(parameter.detach().float() * factor + 0.01)
        applied, _ = state.optimizer.step_if(lambda: True)
        assert applied


def save(directory: Path, context: ParallelContext, state: TrainState) -> None:
    progress = Progress(step=2, consumed_samples=0)
    request = request_save(directory, context, state.state_parts(), progress)
    write_in_turn(request).execute_sync()


def main() -> None:
    """Arguments: a directory for checkpoints, a configuration, and ``NAME=JSON`` of each layout.

    The first layout trains; every other one loads the checkpoint of the one before into other
    weights, and saves it as ``NAME``.
    """
    out, config_file = map(Path, sys.argv[1:3])
    torch.set_num_threads(1)
    launch = DistEnv(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    before: Path | None = None
    for seed, layout in enumerate(sys.argv[3:]):
        name, overrides = layout.split("=", 1)
        context, state = build(config_file, json.loads(overrides), launch, seed)
        if before is None:
            update(state)
        else:
            load_checkpoint(before, context, state.state_parts())
        before = out / name
        save(before, context, state)
        parallel_state.destroy_model_parallel()
    destroy_parallel()


if __name__ == "__main__":
    main()
