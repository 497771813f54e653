"""Anomalous steps: skipped ones, whose loss or gradient was not finite, and spikes of the loss.

Each leaves a line with what is needed to find its samples, in ``OUTPUT/skipped_steps.jsonl`` or
``OUTPUT/loss_spikes.jsonl``.  Lines are never dropped: a step that a resumed run repeats adds
another one.
"""

from __future__ import annotations

import math
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.order import SampleOrder
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.logging.jsonl import LostFn, append_line, refuse
from moiie_megatron.training.step import StepResult

SKIPPED_STEPS_FILE = "skipped_steps.jsonl"
SPIKES_FILE = "loss_spikes.jsonl"
WINDOW = 100  # steps in the median
MIN_STEPS = 20  # losses that a median needs


class SpikeDetector:
    """Compares a loss with the median of the last ``WINDOW`` finite losses.

    Spikes do not move a median as they would move a mean.

    Args:
        factor: A loss above this multiple of the median is a spike.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float) -> float | None:
        """Add a loss.

        Returns:
            The loss divided by the median before it, if it is a spike; else None.
        """
        middle = median(self.losses) if len(self.losses) >= MIN_STEPS else math.inf
        self.losses.append(loss)
        return loss / middle if loss > self.factor * middle > 0 else None


class AnomalyMonitor:
    """Checks every step of a run; every rank makes the same calls and gets the same results.

    Args:
        order: The dataset index of every sample; None where it is unknown (energon).
        lost: Told about a line that could not be written.

    Attributes:
        skipped_in_a_row: Consecutive skipped steps up to the last one.
        spike: The last step's loss as a multiple of the recent median, if it was a spike.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        order: SampleOrder | None,
        lost: LostFn = refuse,
    ) -> None:
        self.skipped_in_a_row = 0
        self.spike: float | None = None
        self._config = config
        self._context = context
        self._order = order
        self._lost = lost
        self._detector = SpikeDetector(config.train.spike_factor)

    def observe(
        self, step: int, first_sample: int, batches: list[Batch], result: StepResult
    ) -> str | None:
        """Check a step, and write down its samples if it is an anomaly.

        Args:
            step: Its number, from 1.
            first_sample: Samples consumed before it.
            batches: This rank's micro-batches.

        Returns:
            Why the run must stop (equal on all ranks), or None.
        """
        self.spike = self._detector.add(result.lm_loss) if result.updated else None
        self.skipped_in_a_row = 0 if result.updated else self.skipped_in_a_row + 1
        if result.updated and self.spike is None:
            return None
        name = SPIKES_FILE if result.updated else SKIPPED_STEPS_FILE
        self._write(name, step, first_sample, batches, result)
        if self.skipped_in_a_row < self._config.train.max_skipped_steps:
            return None
        return (
            f"Stopping: {self.skipped_in_a_row} steps in a row, the last is step {step}, had a "
            f"loss ({result.lm_loss}) or gradient norm ({result.grad_norm}) that is not finite, "
            "as many as train.max_skipped_steps allows: look at their samples in "
            f"{Path(self._config.output) / name}, or lower the learning rate."
        )

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; equal on all ranks."""
        return {
            "losses": list(self._detector.losses),
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._detector.losses.clear()
        self._detector.losses.extend(state["losses"])
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def _write(
        self, name: str, step: int, first_sample: int, batches: list[Batch], result: StepResult
    ) -> None:
        context = self._context
        own = None
        if context.is_last_stage and context.groups.tp.rank() == 0:  # one that has the losses
            own = [
                {
                    "data_parallel_rank": context.dp_rank,
                    "record_ids": list(batch.record_ids),
                    "label_tokens": batch.num_label_tokens,
                    "loss": loss / max(batch.num_label_tokens, 1),
                }
                for batch, loss in zip(batches, result.micro_batch_losses.tolist(), strict=True)
            ]
        ranks: list[Any] = [None] * context.size
        dist.all_gather_object(ranks, own)
        if context.rank != 0:
            return
        parts = sorted(filter(None, ranks), key=lambda part: part[0]["data_parallel_rank"])
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "consumed_samples": first_sample,
            "lm_loss": result.lm_loss,
            "grad_norm": result.grad_norm,
            **self._indices(first_sample),
            # Round-robin over the ranks, as samples are dealt; packing deals rows instead.
            "micro_batches": [batch for turn in zip(*parts, strict=True) for batch in turn],
        }
        append_line(Path(self._config.output) / name, line, self._lost)

    def _indices(self, first_sample: int) -> dict[str, list[int]]:
        if self._order is None:
            return {}
        samples = range(first_sample, first_sample + self._config.train.global_batch_size)
        return {"dataset_indices": [self._order.sample_at(n) for n in samples]}
