"""Steps that went wrong: not finite ones, which changed nothing, and spikes of the loss.

Both leave a line with everything that is needed to look at their samples:
``OUTPUT/skipped_steps.jsonl`` and ``OUTPUT/loss_spikes.jsonl``.  The files only grow: a step that a
resumed run makes again has a line of its own, because the first attempt is evidence too.
"""

from __future__ import annotations

import json
import math
from collections import deque
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.order import SampleOrder
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.step import StepResult

BAD_STEPS_FILE = "skipped_steps.jsonl"
SPIKES_FILE = "loss_spikes.jsonl"
WINDOW = 100  # steps whose losses are remembered
MIN_STEPS = 20  # fewer say nothing about what is usual


class SpikeDetector:
    """Compares a loss with the median of the last ``WINDOW`` finite ones.

    The median is what a step usually costs; unlike a mean, spikes do not move it.

    Args:
        factor: A loss above this multiple of the median is a spike.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float) -> float | None:
        """Remember a loss; its multiple of the median if that is a spike, else None."""
        usual = median(self.losses) if len(self.losses) >= MIN_STEPS else math.inf
        self.losses.append(loss)
        return loss / usual if loss > self.factor * usual > 0 else None


class AnomalyMonitor:
    """Looks at every step of a run; every rank calls it alike and comes to the same results.

    Args:
        order: Gives the dataset index of every sample; None where nobody knows it.

    Attributes:
        bad_in_a_row: Steps up to now whose loss or gradient was not finite.
        spike: The last step's loss as a multiple of the usual one, if it was a spike.
    """

    def __init__(
        self, config: RunConfig, context: ParallelContext, order: SampleOrder | None
    ) -> None:
        self.bad_in_a_row = 0
        self.spike: float | None = None
        self._config = config
        self._world = context
        self._order = order
        self._detector = SpikeDetector(config.train.spike_factor)

    def look(
        self, step: int, first_sample: int, batches: list[Batch], result: StepResult
    ) -> str | None:
        """Judge a step, and write down what its samples were if it went wrong.

        Args:
            step: Its number, from 1.
            first_sample: Samples consumed before it.
            batches: This rank's micro-batches.

        Returns:
            Why the run must stop (alike on all ranks), or None.
        """
        self.spike = self._detector.add(result.lm_loss) if result.updated else None
        self.bad_in_a_row = 0 if result.updated else self.bad_in_a_row + 1
        if result.updated and self.spike is None:
            return None
        name = SPIKES_FILE if result.updated else BAD_STEPS_FILE
        self._write(name, step, first_sample, batches, result)
        if self.bad_in_a_row < self._config.train.max_skipped_steps:
            return None
        return (
            f"Stopping: {self.bad_in_a_row} steps in a row, the last is step {step}, had a loss "
            f"({result.lm_loss}) or gradient norm ({result.grad_norm}) that is not finite, as "
            f"many as train.max_skipped_steps allows: look at their samples in "
            f"{Path(self._config.output) / name}, or lower the learning rate."
        )

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; alike on all ranks."""
        return {"losses": list(self._detector.losses), "bad_in_a_row": self.bad_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._detector.losses.clear()
        self._detector.losses.extend(state["losses"])
        self.bad_in_a_row = state["bad_in_a_row"]

    def _write(
        self, name: str, step: int, first_sample: int, batches: list[Batch], result: StepResult
    ) -> None:
        context = self._world
        mine = None
        if context.is_last_stage and context.groups.tp.rank() == 0:  # who knows the losses
            mine = [
                {
                    "data_parallel_rank": context.dp_rank,
                    "record_ids": list(batch.record_ids),
                    "label_tokens": batch.num_label_tokens,
                    "loss": loss / max(batch.num_label_tokens, 1),
                }
                for batch, loss in zip(batches, result.losses_M.tolist(), strict=True)
            ]
        ranks: list[Any] = [None] * context.size
        dist.all_gather_object(ranks, mine)
        if context.rank != 0:
            return
        parts = sorted(filter(None, ranks), key=lambda part: part[0]["data_parallel_rank"])
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": step,
            "consumed_samples": first_sample,
            "lm_loss": result.lm_loss,
            "grad_norm": result.grad_norm,
            **self._indices(first_sample),
            # In turns of the ranks; packed rows hold the samples of a rank in another order.
            "micro_batches": [batch for turn in zip(*parts, strict=True) for batch in turn],
        }
        with (Path(self._config.output) / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _indices(self, first_sample: int) -> dict[str, list[int]]:
        if self._order is None:
            return {}
        samples = range(first_sample, first_sample + self._config.train.global_batch_size)
        return {"dataset_indices": [self._order.sample_at(n) for n in samples]}
