"""A run from its configuration to its last checkpoint."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from moiie_megatron.backend.parallel import World
from moiie_megatron.checkpoint.folder import latest_checkpoint
from moiie_megatron.checkpoint.from_hf import load_pretrained
from moiie_megatron.checkpoint.store import (
    Progress,
    load_checkpoint,
    load_common,
    save_checkpoint,
)
from moiie_megatron.checkpoint.upcycle import load_weights
from moiie_megatron.config.load import dump_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.build import build_dataset, build_train_loader
from moiie_megatron.data.faults import FaultMonitor
from moiie_megatron.multimodal.build import build_model
from moiie_megatron.training.metrics import RunLog
from moiie_megatron.training.routing import RoutingCounters
from moiie_megatron.training.setup import Trainee, prepare_training
from moiie_megatron.training.step import num_microbatches, train_step


def total_steps(config: RunConfig, num_samples: int) -> int:
    """Optimizer steps of the whole run."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, math.ceil(config.train.epochs * num_samples / config.train.global_batch_size))


def train(config: RunConfig, world: World) -> Path:
    """Train, or go on with a run that was interrupted; every rank calls this.

    Returns:
        The last checkpoint.

    Raises:
        ValueError: Data, weights or checkpoints do not fit the configuration, or too many
            samples are bad.
    """
    dataset = build_dataset(config)
    steps = total_steps(config, len(dataset))
    resume_from = latest_checkpoint(config.output)
    if resume_from is not None and load_common(resume_from)["progress"]["step"] >= steps:
        if world.rank == 0:
            print(f"{resume_from} already is the end of this run: nothing to do.", flush=True)
        return resume_from
    model = build_model(config, world)
    if resume_from is None:
        _load_initial_weights(config, world, model)
    trainee = prepare_training(config, world, model, steps)
    progress = Progress(0, 0, num_samples=len(dataset), seed=config.train.seed)
    if resume_from is not None:
        saved = load_checkpoint(resume_from, world, trainee.state_parts())
        _check_same_order(saved, progress, resume_from)
        progress = saved
    _announce(config, world, resume_from, progress, steps)

    loader = build_train_loader(
        config,
        dataset,
        consumed_samples=progress.consumed_samples,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        pin_memory=world.device.is_cuda,
    )
    log = RunLog(config, world, start_step=progress.step, total_steps=steps)
    counters = RoutingCounters(config, world, trainee.model)
    monitor = FaultMonitor(config.data.max_bad_share)
    trainee.ddp.train()
    checkpoint = resume_from
    while progress.step < steps:
        batches = [next(loader) for _ in range(num_microbatches(config, world))]
        for batch in batches:
            monitor.add(batch)
        learning_rates = current_learning_rates(config, trainee)
        result = train_step(config, world, trainee, batches)
        progress = replace(
            progress,
            step=progress.step + 1,
            consumed_samples=progress.consumed_samples + config.train.global_batch_size,
        )
        counters.count_step(len(batches) * world.dp_size)
        losses = counters.losses() if log.is_due(progress.step) else None
        log.step(progress.step, result, learning_rates, losses, monitor.bad)
        saves = progress.step % config.checkpoint.interval == 0 or progress.step == steps
        # Also before a checkpoint: it holds no counters, and a run that goes on loses none.
        if saves or progress.step % config.log.routing_interval == 0:
            log.routing(progress.step, counters.record())
        if saves:
            checkpoint = save_checkpoint(config, world, trainee.state_parts(), progress)
            log.saved(checkpoint)
    log.close()
    assert checkpoint is not None
    return checkpoint


def current_learning_rates(config: RunConfig, trainee: Trainee) -> dict[str, float]:
    """The learning rate that the next step uses, by part; alike on all ranks."""
    ratio = config.optimizer.min_lr_ratio
    return {
        part: trainee.scheduler.get_lr({"max_lr": lr, "min_lr": lr * ratio})
        for part, lr in config.stage.learning_rates.items()
    }


def _load_initial_weights(config: RunConfig, world: World, model: torch.nn.Module) -> None:
    """Weights from pretrained folders, then (over them) from an earlier stage's checkpoint."""
    if config.checkpoint.init_from is not None:
        folder = Path(config.checkpoint.init_from)
        # A run's output folder stands for its newest checkpoint.
        source = latest_checkpoint(folder) or folder
        load_weights(source, world, model, new_connector=config.checkpoint.new_connector)
        return
    load_pretrained(model, config)


def _check_same_order(saved: Progress, now: Progress, folder: Path) -> None:
    """The order of samples is a function of the seed and of the number of samples.

    Raises:
        ValueError: One of them has changed, so samples would be repeated and others left out.
    """
    for key, name in (("num_samples", "the number of samples"), ("seed", "train.seed")):
        if getattr(saved, key) != getattr(now, key):
            raise ValueError(
                f"{folder} was saved when {name} was {getattr(saved, key)}, now it is "
                f"{getattr(now, key)}: restore it, or start a new run in another output folder."
            )


def _announce(
    config: RunConfig, world: World, resume_from: Path | None, progress: Progress, steps: int
) -> None:
    """Leave the resolved configuration in the output folder and say what is about to happen."""
    if world.rank == 0:
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        beside = output / "config.yaml.writing"
        beside.write_text(dump_config(config))
        os.replace(beside, output / "config.yaml")
        parts = ", ".join(config.stage.learning_rates)
        start = f"going on from {resume_from}" if resume_from else "starting"
        print(
            f"Stage {config.stage.name}: {start} at step {progress.step} of {steps}; trains "
            f"{parts}; {world.size} process(es) on {world.device.type}.",
            flush=True,
        )
    dist.barrier()
