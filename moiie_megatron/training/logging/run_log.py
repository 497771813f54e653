"""What is said about a run: lines of standard output, the same as JSONL, and TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.logging.jsonl import StepLines
from moiie_megatron.training.logging.router_stats import RouterLosses
from moiie_megatron.training.logging.scalars import Scalars, routing_scalars
from moiie_megatron.training.step import StepResult


class RunLog:
    """Writes on rank 0: standard output, ``metrics.jsonl``, ``routing.jsonl``, ``tensorboard/``.

    A line of ``metrics.jsonl`` holds the values of its own step, but for the means and rates
    that its keys say: balance and z-losses (``aux_ROUTER``, ``z_ROUTER``), ``seconds`` and
    ``tokens_per_second`` cover all steps since the line before.  ``routing.jsonl`` is described
    in ``routing_stats/record.py``.  A resumed run drops what was logged after its checkpoint,
    so that the files read as if the run had never stopped.
    """

    def __init__(
        self, config: RunConfig, context: ParallelContext, *, start_step: int, total_steps: int
    ):
        self.interval = config.log.interval
        self.total_steps = total_steps
        self.start_step = start_step
        self.active = context.rank == 0
        self.start_time = self.last_time = time.monotonic()
        self.tokens = 0
        if not self.active:
            return
        output = Path(config.output)
        self.metrics = StepLines(output / "metrics.jsonl", start_step)
        self.routes = StepLines(output / "routing.jsonl", start_step)
        self.scalars = Scalars(config, start_step)

    def is_due(self, step: int) -> bool:
        """Whether a step (counted from 1) gets a line; alike on all ranks."""
        return step % self.interval == 0 or step in (1, self.total_steps)

    def step(
        self,
        step: int,
        result: StepResult,
        learning_rates: dict[str, float],
        losses: RouterLosses | None,
        skipped_samples: int,
        skipped: int,
        spike: float | None,
    ) -> None:
        """Report one optimizer step.

        Args:
            losses: Of the routers; None where no line is due.
            skipped: Steps up to now whose loss or gradient was not finite.
            spike: The loss as a multiple of what is usual, if it is a spike.
        """
        self.tokens += result.tokens
        if losses is None:
            return
        now = time.monotonic()
        seconds, self.last_time = now - self.last_time, now
        tokens, self.tokens = self.tokens, 0
        if not self.active:
            return
        values = {
            "step": step,
            "lm_loss": result.lm_loss,
            **{f"aux_{name}": value for name, value in losses.aux.items()},
            **{f"z_{name}": value for name, value in losses.z.items()},
            **{f"lr_{part}": lr for part, lr in learning_rates.items()},
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "label_tokens": result.label_tokens,
            "image_fraction": result.image_tokens / max(result.tokens, 1),
            "padding_fraction": 1 - result.tokens / result.positions,
            # Padding does not count.
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "seconds": seconds,
            "skipped_samples": skipped_samples,
            "skipped_steps": skipped,
            **({} if spike is None else {"spike": spike}),
        }
        self.metrics.add(values)
        self.scalars.add({name: v for name, v in values.items() if name != "step"}, step)
        print(self._line(step, result, values, learning_rates, now), flush=True)

    def routing(self, step: int, record: Mapping[str, Any] | None) -> None:
        """Report the routing of the steps up to this one; a dense model has none."""
        if self.active and record is not None:
            self.routes.add({"step": step, **record})
            self.scalars.add(routing_scalars(record), step)

    def _line(
        self,
        step: int,
        result: StepResult,
        values: dict[str, Any],
        learning_rates: dict[str, float],
        now: float,
    ) -> str:
        per_step = (now - self.start_time) / (step - self.start_step)
        minutes, seconds = divmod(round(per_step * (self.total_steps - step)), 60)
        left = f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
        aux = " ".join(f"{k[4:]} {v:.3f}" for k, v in values.items() if k.startswith("aux_"))
        return (
            f"step {step}/{self.total_steps} | loss {result.lm_loss:.4f} | "
            + (f"aux {aux} | " if aux else "")
            + f"lr {max(learning_rates.values()):.2e} | grad {result.grad_norm:.3f} | "
            f"{values['tokens_per_second']:.0f} tok/s | image {values['image_fraction']:.0%} | "
            f"left {left}"
            + ("" if result.updated else " | SKIPPED: loss or gradient is not finite")
            + (f" | SPIKE: {values['spike']:.1f} x the usual loss" if "spike" in values else "")
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as the next step's time."""
        begin = time.monotonic()
        yield
        self.last_time += time.monotonic() - begin

    def saved(self, checkpoint: Path, seconds: float) -> None:
        """Report a checkpoint that is complete; the time it took since its save began."""
        if self.active:
            print(f"saved {checkpoint} in {seconds:.1f} s", flush=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self.active:
            self.metrics.close()
            self.routes.close()
            self.scalars.close()
