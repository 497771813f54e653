"""Runs of the tiny models that are saved and go on, with and without Transformer Engine."""

from __future__ import annotations

from pathlib import Path

from moiie_megatron.checkpoint.directory import CONFIG_FILE, copy_tokenizer
from moiie_megatron.checkpoint.parallel_io import write_in_turn
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.save_load import request_save
from moiie_megatron.config.load import dump_config
from moiie_megatron.config.schema import MoEConfig, RunConfig
from moiie_megatron.mcore.parallel import ParallelContext, seed_everything
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.training.step import StepResult, train_step
from moiie_megatron.vlm.build import build_chunks
from moiie_megatron.vlm.chunks import ModelChunks
from tests.helpers.tiny_hf import write_language
from tests.te.steps import RATES, padded, tiny_config


def config_of(model: str) -> RunConfig:
    """``dense`` or ``moe``; everything trains."""
    if model == "moe":
        return tiny_config()
    moe = MoEConfig(variant="dense")
    config = tiny_config(moe=moe)
    rates = {part: rate for part, rate in RATES.items() if part != "moe"}
    stage = config.stage.model_copy(update={"moe": False, "learning_rates": rates})
    return config.model_copy(update={"stage": stage})


def fresh_model(model: str, context: ParallelContext, seed: int) -> ModelChunks:
    seed_everything(seed, context.groups)
    return build_chunks(config_of(model), context)


def start(model: str, context: ParallelContext, seed: int) -> TrainState:
    return prepare_training(config_of(model), context, fresh_model(model, context, seed), steps=10)


def step(model: str, context: ParallelContext, state: TrainState) -> StepResult:
    return train_step(config_of(model), context, state, [padded()])


def save(folder: Path, model: str, context: ParallelContext, state: TrainState) -> Path:
    """A checkpoint that can be exported."""
    progress = Progress(step=2, consumed_samples=0)
    write_in_turn(request_save(folder, context, state.state_parts(), progress)).execute_sync()
    (folder / CONFIG_FILE).write_text(dump_config(config_of(model)))
    copy_tokenizer(write_language(folder.with_name("language")), folder)
    return folder
