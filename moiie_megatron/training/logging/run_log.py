"""The log of a run: lines for the operator, JSONL files, and TensorBoard."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.routing_stats.counters import RouterLosses
from moiie_megatron.routing_stats.scalars import routing_scalars
from moiie_megatron.training.logging.evaluations import NewResults, read_evaluated
from moiie_megatron.training.logging.jsonl import LostFn, StepLines, complete_lines, refuse
from moiie_megatron.training.logging.scalars import Scalars
from moiie_megatron.training.logging.throughput import Throughput, describe
from moiie_megatron.training.step import StepResult
from moiie_megatron.training.validation.result import VALIDATION_FILE, Validation

LOGGER: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step.

    Attributes:
        step: Its number, from 1.
        result: What it did.
        router_losses: Means since the last line; None where no line is due.
        data_wait: Seconds that the rank with the slowest data has waited for the step's batches.
        memory: Peaks since the last line (``memory.py``).
        skipped_samples: Samples skipped so far, on all ranks.
        skipped_steps: Steps so far that changed nothing.
        spike: The loss as a multiple of the recent median, if it is a spike.
    """

    step: int
    result: StepResult
    router_losses: RouterLosses | None
    data_wait: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)
    skipped_samples: int = 0
    skipped_steps: int = 0
    spike: float | None = None


class RunLog:
    """Writes on rank 0: the operator's lines, the JSON lines of steps, TensorBoard.

    A line of ``metrics.jsonl`` holds the values of its own step, with these exceptions, which
    cover all steps since the line before: the mean balance and z-losses (``aux_ROUTER``,
    ``z_ROUTER``), ``seconds``, the rates (``throughput.py``) and, on GPUs, the peaks of memory
    (``memory_*_gib``).  ``routing_stats/record.py`` describes ``routing.jsonl``,
    ``validation/result.py`` ``validation.jsonl``, which only runs that validate have.  A resumed
    run drops what was logged after its checkpoint, so that the files read as if the run had never
    stopped.

    Args:
        start_step: Steps done before.
        total_steps: Steps of the whole run.
        lost: Told about what could not be written.
        clock: Seconds, from any origin.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        *,
        start_step: int,
        total_steps: int,
        lost: LostFn = refuse,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.interval = config.log.interval
        self.total_steps = total_steps
        self.start_step = start_step
        self.active = context.rank == 0
        self.clock = clock
        self.start_time = self.last_time = clock()
        self.throughput = Throughput(config, context)
        if not self.active:
            return
        output = Path(config.output)
        self.metrics = StepLines(output / "metrics.jsonl", start_step, lost)
        self.routes = StepLines(output / "routing.jsonl", start_step, lost)
        self.validations: StepLines | None = None
        validation_file = output / VALIDATION_FILE
        if config.data.validation.sources or validation_file.exists():
            self.validations = StepLines(validation_file, start_step, lost)
        self.validated_steps = {line["step"] for line in complete_lines(validation_file)}
        self.scalars = Scalars(config, start_step, lost)
        self.evaluations: NewResults | None = None
        if config.evaluation.interval:
            self.evaluations = NewResults(output)
            self.evaluations.read()
            # Some of them may have come while nobody listened.
            for result in read_evaluated(output):
                self.scalars.add_late({result.scalar: result.value}, result.step)

    def is_due(self, step: int) -> bool:
        """Whether a step (counted from 1) gets a line; equal on all ranks."""
        return step % self.interval == 0 or step in (1, self.total_steps)

    def step(self, report: StepReport) -> None:
        """Log one optimizer step."""
        result, losses = report.result, report.router_losses
        self.throughput.add(result, report.data_wait)
        if losses is None:
            return
        now = self.clock()
        seconds, self.last_time = now - self.last_time, now
        rates = self.throughput.take(seconds)
        if not self.active:
            return
        values = {
            "step": report.step,
            "lm_loss": result.lm_loss,
            **{f"aux_{name}": value for name, value in losses.aux.items()},
            **{f"z_{name}": value for name, value in losses.z.items()},
            **{f"lr_{part}": lr for part, lr in result.learning_rates.items()},
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "label_tokens": result.label_tokens,
            "image_fraction": result.image_tokens / max(result.tokens, 1),
            "padding_fraction": 1 - result.tokens / result.positions,
            **rates,
            "seconds": seconds,
            **report.memory,
            "skipped_samples": report.skipped_samples,
            "skipped_steps": report.skipped_steps,
            **({} if report.spike is None else {"spike": report.spike}),
        }
        self.metrics.add(values)
        self.scalars.add({name: v for name, v in values.items() if name != "step"}, report.step)
        LOGGER.info("%s", self._line(report, values, now))
        self.evaluated()

    def evaluated(self) -> None:
        """Log what evaluations have found since the last look."""
        if self.active and self.evaluations is not None:
            for result in self.evaluations.read():
                LOGGER.info("%s", result)
                self.scalars.add_late({result.scalar: result.value}, result.step)

    def routing(self, step: int, record: Mapping[str, Any] | None) -> None:
        """Log the routing since the last record; None for a dense model."""
        if self.active and record is not None:
            self.routes.add({"step": step, **record})
            self.scalars.add(routing_scalars(record), step)

    def validated(self, step: int, result: Validation) -> None:
        """Log the losses on held-out samples after a step (0: before the first one)."""
        if not self.active or self.validations is None:
            return
        self.validations.add({"step": step, **result.to_json()})
        self.scalars.add(result.scalars(), step)
        LOGGER.info("validation of step %d | %s", step, result)

    def is_validated(self, step: int) -> bool:
        """Whether the file had a step before this program; known to rank 0."""
        return self.active and step in self.validated_steps

    def _line(self, report: StepReport, values: dict[str, Any], now: float) -> str:
        step, result = report.step, report.result
        per_step = (now - self.start_time) / (step - self.start_step)
        minutes, seconds = divmod(round(per_step * (self.total_steps - step)), 60)
        left = f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
        aux = " ".join(f"{k[4:]} {v:.3f}" for k, v in values.items() if k.startswith("aux_"))
        return (
            f"step {step}/{self.total_steps} | loss {result.lm_loss:.4f} | "
            + (f"aux {aux} | " if aux else "")
            + f"lr {max(result.learning_rates.values()):.2e} | grad {result.grad_norm:.3f} | "
            f"{describe(values)} | image {values['image_fraction']:.0%} | "
            + (f"memory {_memory(report.memory)} | " if report.memory else "")
            + f"left {left}"
            + ("" if result.updated else " | SKIPPED: loss or gradient is not finite")
            + (f" | SPIKE: {report.spike:.1f} x the usual loss" if report.spike is not None else "")
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of ``seconds`` and the rates."""
        begin = self.clock()
        yield
        self.last_time += self.clock() - begin

    def saved(self, checkpoint: Path, seconds: float) -> None:
        """Report a complete checkpoint, and the seconds since its save began."""
        LOGGER.info("saved %s in %.1f s", checkpoint, seconds)

    def close(self) -> None:
        """Flush and close the files."""
        self.evaluated()
        if self.active:
            self.metrics.close()
            self.routes.close()
            if self.validations is not None:
                self.validations.close()
            self.scalars.close()


def _memory(peaks: Mapping[str, float]) -> str:
    """Allocated, and what torch's allocator holds for it."""
    allocated, reserved = peaks["memory_allocated_gib"], peaks["memory_reserved_gib"]
    return f"{allocated:.1f} GiB ({reserved:.1f} reserved)"
