"""Skipped samples of the whole run: counted over all ranks, each listed once.

``skipped_samples.jsonl`` in the output directory has one line per record that could not be used,
with the step that met it first: ``{"step", "file", "index", "reason"}``.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.data.stream.skipped_samples import SkippedSampleMonitor
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.logging.jsonl import LostFn, StepLines, complete_lines, refuse

LOGGER: Final = logging.getLogger(__name__)
SKIPPED_SAMPLES_FILE: Final = "skipped_samples.jsonl"


class SkippedSampleLog:
    """Counts on every rank, writes on rank 0.

    A resumed run goes on counting from its checkpoint and drops the lines of later steps.

    Args:
        progress: Where the run starts.
        lost: Told about a line that could not be written.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        progress: Progress,
        lost: LostFn = refuse,
    ) -> None:
        self.context = context
        self.monitor = SkippedSampleMonitor(
            config.data.max_skipped_fraction,
            num_used=progress.consumed_samples,
            num_skipped=progress.skipped_samples,
        )
        self.listed: set[tuple[str, int]] = set()
        if context.rank == 0:
            path = Path(config.output) / SKIPPED_SAMPLES_FILE
            self.lines = StepLines(path, progress.step, lost)
            self.listed = {(line["file"], line["index"]) for line in complete_lines(path)}

    @property
    def count(self) -> int:
        """Samples skipped so far on all data-parallel ranks, repeats included."""
        return self.monitor.num_skipped

    def add(self, batches: list[Batch], step: int) -> None:
        """Count this rank's micro-batches of a step; every rank calls this.

        Raises:
            UserError: Too many samples were skipped (``SkippedSampleMonitor``); on all ranks.
        """
        skipped = [sample for batch in batches for sample in batch.skipped_samples]
        group = self.context.groups.dp
        counts = torch.tensor([sum(len(batch.record_ids) for batch in batches), len(skipped)])
        counts = counts.to(self.context.device.torch_device)
        dist.all_reduce(counts, group=group)
        num_used, num_skipped = counts.tolist()
        if num_skipped:  # equal on all ranks: the samples travel only in steps that have some
            parts: list[list[SkippedSample]] = [[] for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(parts, skipped, group=group)
            skipped = [sample for part in parts for sample in part]
            self._list(skipped, step)
        self.monitor.add(num_used, skipped)

    def _list(self, skipped: list[SkippedSample], step: int) -> None:
        if self.context.rank != 0:
            return
        for sample in skipped:
            if (sample.file, sample.index) in self.listed:
                continue
            self.listed.add((sample.file, sample.index))
            self.lines.add({"step": step, **asdict(sample)})
            LOGGER.warning("skipped %s[%d]: %s", sample.file, sample.index, sample.reason)

    def close(self) -> None:
        """Close the file."""
        if self.context.rank == 0:
            self.lines.close()
