"""The objects of a run, and what one step does with them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch.distributed as dist

from moiie_megatron.checkpoint.find_latest import agree_on_newest
from moiie_megatron.checkpoint.load_weights import load_weights
from moiie_megatron.checkpoint.save_load import load_checkpoint
from moiie_megatron.checkpoint.saver import CheckpointSaver
from moiie_megatron.config.load import dump_config
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.convert.load_pretrained import load_pretrained
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.build import build_train_loader
from moiie_megatron.data.stream.held_out import HeldOut, open_held_out
from moiie_megatron.data.stream.order import SampleOrder
from moiie_megatron.data.stream.stream_state import StreamState
from moiie_megatron.mcore.gpu_environment import tf32_users
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.routing_stats.counters import RoutingCounters
from moiie_megatron.training.anomalies import AnomalyMonitor
from moiie_megatron.training.logging.jsonl import lost_sentence
from moiie_megatron.training.logging.memory import peak_memory
from moiie_megatron.training.logging.run_log import RunLog, StepReport
from moiie_megatron.training.profiling import StepProfiler
from moiie_megatron.training.resume import RunStart
from moiie_megatron.training.skipped_samples import SkippedSampleLog
from moiie_megatron.training.state import TrainState, prepare_training
from moiie_megatron.training.step import StepResult, train_step
from moiie_megatron.training.stop import StopRequest
from moiie_megatron.training.validation.validator import Validator
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import atomic_write
from moiie_megatron.vlm.build import build_chunks
from moiie_megatron.vlm.chunks import ModelChunks

LOGGER: Final = logging.getLogger(__name__)


class Run:
    """A run that is set up to train; every rank calls every method.

    Args:
        start: Where it starts; not finished.
        stop: Checked after every step.

    Attributes:
        progress: How far it is.

    Raises:
        UserError: A log cannot be written, or weights or the checkpoint do not fit the
            configuration.
    """

    def __init__(
        self, config: RunConfig, context: ParallelContext, start: RunStart, stop: StopRequest
    ) -> None:
        self.config = config
        self.context = context
        self.progress = start.progress
        self._total_steps = start.total_steps
        self._stop = stop
        self._data_wait = 0.0
        self._train_state = _build_train_state(config, context, start)
        is_energon = config.data.loader == "energon"  # has an order and a state of its own
        order = None if is_energon else SampleOrder(start.dataset.blend, config.train.seed)
        self._anomalies = AnomalyMonitor(config, context, order, stop.fail)
        stream = StreamState()
        parts = self._train_state.state_parts() | {"counters": {"anomalies": self._anomalies}}
        if is_energon:
            parts["stream"] = stream
        if start.checkpoint is not None:
            load_checkpoint(start.checkpoint, context, parts)
        held_out = open_held_out(config, start.dataset.encoding)
        self._announce(start, held_out)
        self._loader = build_train_loader(
            config,
            start.dataset,
            consumed_samples=self.progress.consumed_samples,
            dp_rank=context.dp_rank,
            dp_size=context.dp_size,
            ranks=context,
            pin_memory=context.device.is_cuda,
            state=stream,
            is_stopping=lambda: any(stop.flags(None)),
        )
        self._log = RunLog(
            config,
            context,
            start_step=self.progress.step,
            total_steps=start.total_steps,
            lost=stop.fail,
        )
        self._skipped_samples = SkippedSampleLog(config, context, self.progress, stop.fail)
        self._saver = CheckpointSaver(config, context, parts, self._log.saved, start.checkpoint)
        self._profiler = StepProfiler(config, context, stop.fail)
        self._counters = RoutingCounters(config, context, self._train_state.model)
        self._validator = None if held_out is None else Validator(config, context, held_out)
        self._train_state.model.train()

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or all ranks have agreed to stop early."""
        return self.progress.step >= self._total_steps or self._stop.reason is not None

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step.

        Raises:
            UserError: Too many samples were skipped.
        """
        begin = time.monotonic()
        batches = next(self._loader)
        self._data_wait = time.monotonic() - begin
        self._skipped_samples.add(batches, self.progress.step + 1)
        return batches

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step."""
        exit_after = self.config.train.exit_after_minutes
        # A sum in which every rank has a place of its own tells the longest wait of all.
        waits = [0.0] * self.context.size
        waits[self.context.rank] = self._data_wait
        self._profiler.before(self.progress.step + 1)
        result = train_step(
            self.config,
            self.context,
            self._train_state,
            batches,
            also_sum=lambda: [*waits, *self._stop.flags(exit_after)],
        )
        self._data_wait = max(result.also_summed[: len(waits)])
        self._stop.resolve(result.also_summed[len(waits) :], exit_after)
        return result

    def report(self, batches: list[Batch], result: StepResult) -> None:
        """Count and log a step.

        Raises:
            UserError: Too many steps in a row were skipped, or a checkpoint written in the
                background has failed.
        """
        before = self.progress
        problem = self._anomalies.observe(before.step + 1, before.consumed_samples, batches, result)
        self.progress = replace(
            before,
            step=before.step + 1,
            consumed_samples=before.consumed_samples + self.config.train.global_batch_size,
            skipped_samples=self._skipped_samples.count,
            skipped_steps=before.skipped_steps + (not result.updated),
        )
        self._profiler.after(self.progress.step, last=self.is_over)
        self._counters.count_step(len(batches) * self.context.dp_size)
        is_due = self._log.is_due(self.progress.step)
        self._log.step(
            StepReport(
                step=self.progress.step,
                result=result,
                data_wait=self._data_wait,
                router_losses=self._counters.losses() if is_due else None,
                memory=peak_memory(self.context) if is_due else {},
                skipped_samples=self.progress.skipped_samples,
                skipped_steps=self.progress.skipped_steps,
                spike=self._anomalies.spike,
            )
        )
        with self._log.paused():
            self._saver.poll()
        if problem is not None:
            self._saver.drain()
            raise UserError(problem)

    def save_if_due(self) -> None:
        """Save every ``checkpoint.interval`` steps and at the end, and log the routing.

        Raises:
            UserError: A checkpoint could not be written.
        """
        step = self.progress.step
        is_due = step % self.config.checkpoint.interval == 0 or self.is_over
        # Also before a checkpoint, which holds no counters: a run that resumes loses none.
        if is_due or step % self.config.log.routing_interval == 0:
            self._log.routing(step, self._counters.record())
        if is_due:
            self._save()

    def _save(self) -> None:
        with self._log.paused():
            self._train_state.gather_weights()
            self._saver.save(self.progress)

    def validate_before(self) -> None:
        """Validate before the next step, where a run starts that wants it.

        A run that goes on from a checkpoint does so if it was stopped in the validation that
        followed it.

        Raises:
            UserError: See ``validate_if_due``.
        """
        step = self.progress.step
        wanted = (
            self.config.data.validation.at_start if step == 0 else self._is_validated_after(step)
        )
        if self._validator is None or not wanted:
            return
        known = [self._log.is_validated(step)]
        dist.broadcast_object_list(known, src=0)
        if not known[0]:
            # A request to stop is for the end of the next step, where there is something to save.
            self._validate(self._validator, any)

    def validate_if_due(self) -> None:
        """Validate every ``data.validation.interval`` steps and at the end; not when stopping.

        A validation that is asked to stop leaves off.  The run is saved then, and begins with this
        validation when it goes on; after its last step it has been saved, and is over.

        Raises:
            UserError: Held-out samples cannot be read, or a checkpoint could not be written.
        """
        step = self.progress.step
        if self._validator is None or self._stop.reason or not self._is_validated_after(step):
            return
        is_saved = step % self.config.checkpoint.interval == 0 or self.is_over
        self._validate(self._validator, any if self.is_over else self._is_stopped)
        if self._stop.reason and not is_saved:
            if step % self.config.log.routing_interval:
                self._log.routing(step, self._counters.record())
            self._save()

    def _is_validated_after(self, step: int) -> bool:
        return step % self.config.data.validation.interval == 0 or step == self._total_steps

    def _is_stopped(self, flag_sums: list[float]) -> bool:
        self._stop.resolve(flag_sums, self.config.train.exit_after_minutes)
        return self._stop.reason is not None

    def _validate(self, validator: Validator, is_stopped: Callable[[list[float]], bool]) -> None:
        exit_after = self.config.train.exit_after_minutes
        with self._log.paused():
            self._train_state.gather_weights()
            result = validator.measure(
                self._train_state.model,
                stop_flags=lambda: self._stop.flags(exit_after),
                is_stopped=is_stopped,
            )
        if result is None:
            LOGGER.info("The validation of step %d was stopped.", self.progress.step)
            return
        try:
            validator.check(result)
        except UserError:
            self._saver.drain()
            raise
        self._log.validated(self.progress.step, result)

    def complete(self) -> None:
        """Wait for the last save.

        Raises:
            UserError: It could not be written.
        """
        self._saver.drain()

    def finish(self) -> Path:
        """Close the logs.

        Returns:
            The last checkpoint.

        Raises:
            UserError: A log could not be written.
        """
        self._skipped_samples.close()
        self._log.close()
        assert self._saver.newest is not None
        if self._stop.failure is not None:
            raise UserError(
                f"{self._stop.failure.rstrip('.')} (the run goes on from {self._saver.newest})."
            )
        if self._stop.reason is not None:
            LOGGER.info(
                "Stopped after step %d of %d because of %s: the same command goes on from %s.",
                self.progress.step,
                self._total_steps,
                self._stop.reason,
                self._saver.newest,
            )
        return self._saver.newest

    def _announce(self, start: RunStart, held_out: HeldOut | None) -> None:
        """Leave the resolved configuration in the output directory and say what will happen."""
        config, context = self.config, self.context
        if context.rank == 0:
            path = Path(config.output) / "config.yaml"
            try:
                with atomic_write(path) as file:
                    file.write_text(dump_config(config))
            except OSError as error:
                raise UserError(lost_sentence(path, error)) from error
        LOGGER.info(
            "Stage %s: %s at step %d of %d; trains %s; %d process(es) on %s.",
            config.stage.name,
            f"going on from {start.checkpoint}" if start.checkpoint else "starting",
            self.progress.step,
            start.total_steps,
            ", ".join(config.stage.learning_rates),
            context.size,
            context.device.type,
        )
        if config.train.precision == "fp32" and context.device.is_cuda:
            rounded = tf32_users(context.device.transformer_engine)
            if rounded:
                LOGGER.info(
                    "fp32 is TF32 (10 bits of mantissa) in %s; NVIDIA_TF32_OVERRIDE=0 in the "
                    "environment keeps all 23 bits.",
                    ", ".join(rounded),
                )
        LOGGER.info("%s", start.dataset.describe_epoch())
        if held_out is not None:
            LOGGER.info(
                "validation every %d steps on %s",
                config.data.validation.interval,
                held_out.describe(),
            )
        dist.barrier()


def _build_train_state(config: RunConfig, context: ParallelContext, start: RunStart) -> TrainState:
    """Model and optimizer; with the initial weights at a run's first start."""
    model = build_chunks(config, context)
    if start.checkpoint is None:
        _load_initial_weights(config, context, model)
    return prepare_training(config, context, model, start.total_steps)


def _load_initial_weights(config: RunConfig, context: ParallelContext, model: ModelChunks) -> None:
    """Weights from an earlier stage's checkpoint, or else from pretrained directories."""
    if config.checkpoint.init_from is not None:
        directory = Path(config.checkpoint.init_from)
        # A run's output directory stands for its newest checkpoint.
        source = agree_on_newest(directory, context) or directory
        load_weights(source, context, model, new_connector=config.checkpoint.new_connector)
        return
    load_pretrained(model, config)
