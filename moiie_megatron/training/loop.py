"""A run from its configuration to its last checkpoint."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from moiie_megatron.checkpoint.find_latest import agree_on_newest
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.checkpoint.save_load import Progress, load_checkpoint, load_common
from moiie_megatron.checkpoint.saver import CheckpointSaver
from moiie_megatron.config.load import dump_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.convert.load_pretrained import load_pretrained
from moiie_megatron.data.stream.build import build_dataset, build_train_loader
from moiie_megatron.data.stream.order import SampleOrder
from moiie_megatron.data.stream.stream_state import StreamState
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.anomalies import AnomalyMonitor
from moiie_megatron.training.logging.router_stats import RoutingCounters
from moiie_megatron.training.logging.run_log import RunLog
from moiie_megatron.training.profiling import StepProfiler
from moiie_megatron.training.skipped_samples import SkippedSampleLog
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.training.step import train_step
from moiie_megatron.training.stop import StopRequest
from moiie_megatron.utils.errors import UserError
from moiie_megatron.vlm.build import build_model


def total_steps(config: RunConfig, num_samples: int) -> int:
    """Optimizer steps of the whole run; an epoch has ``num_samples``."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, math.ceil(config.train.epochs * num_samples / config.train.global_batch_size))


def train(config: RunConfig, context: ParallelContext, stop: StopRequest | None = None) -> Path:
    """Train, or go on with a run that was interrupted; every rank calls this.

    Args:
        stop: Asked after every step whether to save and end early; its reason is set then.

    Returns:
        The last checkpoint.

    Raises:
        UserError: Data, weights or checkpoints do not fit the configuration, a checkpoint
            cannot be written, or too many samples or steps are bad.
    """
    stop = StopRequest() if stop is None else stop
    dataset = build_dataset(config)
    steps = total_steps(config, dataset.blend.epoch_size)
    resume_from = agree_on_newest(config.output, context)
    progress = Progress(
        0,
        0,
        num_samples=dataset.blend.epoch_size,
        seed=config.train.seed,
        blend=dataset.describe_order(context.dp_size),
        schedule=_describe_schedule(config, steps),
        experts=_describe_experts(config),
    )
    if resume_from is not None:
        saved = Progress(**load_common(resume_from)["progress"])
        _check_same_run(saved, progress, resume_from)
        if saved.step >= steps:
            if context.rank == 0:
                print(f"{resume_from} already is the end of this run: nothing to do.", flush=True)
            return resume_from
    _check_output(config, context)
    model = build_model(config, context)
    if resume_from is None:
        _load_initial_weights(config, context, model)
    train_state = prepare_training(config, context, model, steps)
    is_energon = config.data.loader == "energon"  # which has an order of its own
    order = None if is_energon else SampleOrder(dataset.blend, config.train.seed)
    watch = AnomalyMonitor(config, context, order)
    stream = StreamState()
    parts = train_state.state_parts() | {"counters": {"watch": watch}}
    if is_energon:
        parts["stream"] = stream
    if resume_from is not None:
        progress = replace(
            load_checkpoint(resume_from, context, parts),
            schedule=progress.schedule,
            experts=progress.experts,
        )
    _announce(config, context, resume_from, progress, steps)
    if context.rank == 0:
        print(dataset.describe_epoch(), flush=True)

    loader = build_train_loader(
        config,
        dataset,
        consumed_samples=progress.consumed_samples,
        dp_rank=context.dp_rank,
        dp_size=context.dp_size,
        max_over_dp=context.max_over_dp,
        pin_memory=context.device.is_cuda,
        state=stream,
    )
    log = RunLog(config, context, start_step=progress.step, total_steps=steps)
    skipped_samples = SkippedSampleLog(config, context, progress)
    saver = CheckpointSaver(config, context, parts, log.saved, newest=resume_from)
    profiler = StepProfiler(config, context)
    exit_after = config.train.exit_after_minutes
    counters = RoutingCounters(config, context, train_state.model)
    train_state.ddp.train()
    while progress.step < steps and stop.reason is None:
        batches = next(loader)
        skipped_samples.add(batches, progress.step + 1)
        learning_rates = current_learning_rates(config, train_state)
        profiler.before(progress.step + 1)
        result = train_step(
            config, context, train_state, batches, partial(stop.stop_flags, exit_after)
        )
        stop.decide(result.stop_flags, exit_after)
        problem = watch.look(progress.step + 1, progress.consumed_samples, batches, result)
        progress = replace(
            progress,
            step=progress.step + 1,
            consumed_samples=progress.consumed_samples + config.train.global_batch_size,
            skipped_samples=skipped_samples.bad,
            skipped=progress.skipped + (not result.updated),
        )
        is_last = progress.step == steps or stop.reason is not None
        profiler.after(progress.step, last=is_last)
        counters.count_step(len(batches) * context.dp_size)
        losses = counters.losses() if log.is_due(progress.step) else None
        log.step(
            *(progress.step, result, learning_rates, losses),
            *(skipped_samples.bad, progress.skipped, watch.spike),
        )
        with log.paused():
            saver.poll()
        if problem is not None:
            saver.drain()
            raise UserError(problem)
        saves = progress.step % config.checkpoint.interval == 0 or is_last
        # Also before a checkpoint: it holds no counters, and a run that goes on loses none.
        if saves or progress.step % config.log.routing_interval == 0:
            log.routing(progress.step, counters.record())
        if saves:
            with log.paused():
                saver.save(progress)
    saver.drain()
    skipped_samples.close()
    log.close()
    assert saver.newest is not None
    if stop.reason is not None and context.rank == 0:
        print(
            f"Stopped after step {progress.step} of {steps} because of {stop.reason}: the same "
            f"command goes on from {saver.newest}.",
            flush=True,
        )
    return saver.newest


def current_learning_rates(config: RunConfig, train_state: TrainState) -> dict[str, float]:
    """The learning rate that the next step uses, by part; alike on all ranks."""
    ratio = config.optimizer.min_lr_ratio
    return {
        part: train_state.scheduler.get_lr({"max_lr": lr, "min_lr": lr * ratio})
        for part, lr in config.stage.learning_rates.items()
    }


def _load_initial_weights(
    config: RunConfig, context: ParallelContext, model: torch.nn.Module
) -> None:
    """Weights from pretrained folders, then (over them) from an earlier stage's checkpoint."""
    if config.checkpoint.init_from is not None:
        folder = Path(config.checkpoint.init_from)
        # A run's output folder stands for its newest checkpoint.
        source = agree_on_newest(folder, context) or folder
        load_weights(source, context, model, new_connector=config.checkpoint.new_connector)
        return
    load_pretrained(model, config)


def _describe_schedule(config: RunConfig, steps: int) -> str:
    """What the learning rates and the weight decay of all steps depend on."""
    optimizer = config.optimizer
    rates = ", ".join(f"{part} {rate:g}" for part, rate in config.stage.learning_rates.items())
    return (
        f"{steps} steps (train.steps or train.epochs), learning rates {rates}, warmup_ratio "
        f"{optimizer.warmup_ratio:g}, min_lr_ratio {optimizer.min_lr_ratio:g}, weight_decay "
        f"{optimizer.weight_decay:g}"
    )


def _describe_experts(config: RunConfig) -> str:
    """Which experts the model has."""
    if not config.moe_layers:
        return "no experts"
    layout = config.moe.layout
    return (
        f"{config.moe.variant} with {layout.num_vision} vision, {layout.num_shared} shared and "
        f"{layout.num_text} text experts in layers {config.moe_layers}"
    )


def _check_output(config: RunConfig, context: ParallelContext) -> None:
    """Before the model is built, see whether the output folder can be written."""
    if context.rank == 0:
        try:
            Path(config.output).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=config.output):
                pass
        except OSError as error:
            raise UserError(
                f"output is {config.output}, which cannot be written ({error}): name another "
                "folder, or see to its permissions."
            ) from error


def _check_same_run(saved: Progress, now: Progress, folder: Path) -> None:
    """The order of samples is a function of the seed and of the sources' sizes and weights, the
    learning rates are one of the schedule.

    Raises:
        UserError: One of them has changed, so samples would be repeated and others left out, or
            the rates would jump; or the checkpoint is of another model.
    """
    for key, name in (
        ("num_samples", "the number of samples per epoch"),
        ("blend", "the choice of samples per epoch, source by source,"),
        ("seed", "train.seed"),
        ("schedule", "the schedule"),
        ("experts", "the model"),
    ):
        before, after = getattr(saved, key), getattr(now, key)
        if before != after and before != "":  # what older checkpoints do not name
            raise UserError(
                f"{folder} was saved when {name} was {before}, now it is {after}: restore it, or "
                "start a new run in another output folder (checkpoint.init_from takes the weights)."
            )


def _announce(
    config: RunConfig,
    context: ParallelContext,
    resume_from: Path | None,
    progress: Progress,
    steps: int,
) -> None:
    """Leave the resolved configuration in the output folder and say what is about to happen."""
    if context.rank == 0:
        output = Path(config.output)
        beside = output / "config.yaml.writing"
        beside.write_text(dump_config(config))
        os.replace(beside, output / "config.yaml")
        parts = ", ".join(config.stage.learning_rates)
        start = f"going on from {resume_from}" if resume_from else "starting"
        print(
            f"Stage {config.stage.name}: {start} at step {progress.step} of {steps}; trains "
            f"{parts}; {context.size} process(es) on {context.device.type}.",
            flush=True,
        )
    dist.barrier()
