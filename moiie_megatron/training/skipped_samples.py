"""Samples that were left out, seen from the whole run: counted over all ranks, listed once.

``skipped_samples.jsonl`` in the run's output folder has one line per record that could not be used,
with the step that met it first: ``{"step", "file", "index", "reason"}``.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from moiie_megatron.checkpoint.save_load import Progress
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.data.stream.skipped_samples import SkippedSampleMonitor
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.logging.jsonl import StepLines, complete_lines

LOGGER: Final = logging.getLogger(__name__)
FAULTS_FILE: Final = "skipped_samples.jsonl"


class SkippedSampleLog:
    """Counts on every rank, writes on rank 0.

    A resumed run goes on counting from its checkpoint and drops what was written after it.

    Args:
        progress: Where the run starts.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, progress: Progress) -> None:
        self.context = context
        self.monitor = SkippedSampleMonitor(
            config.data.max_skipped_fraction,
            num_used=progress.consumed_samples,
            num_skipped=progress.skipped_samples,
        )
        self.listed: set[tuple[str, int]] = set()
        if context.rank == 0:
            path = Path(config.output) / FAULTS_FILE
            self.lines = StepLines(path, progress.step)
            self.listed = {(line["file"], line["index"]) for line in complete_lines(path)}

    @property
    def bad(self) -> int:
        """Samples left out so far on all data-parallel ranks, repeats included."""
        return self.monitor.num_skipped

    def add(self, batches: list[Batch], step: int) -> None:
        """Take in this rank's micro-batches of a step; every rank calls this.

        Raises:
            UserError: Too many samples are bad (``SkippedSampleMonitor``); alike on all ranks.
        """
        skipped_samples = [fault for batch in batches for fault in batch.skipped_samples]
        group = self.context.groups.dp
        counts = torch.tensor(
            [sum(len(batch.record_ids) for batch in batches), len(skipped_samples)]
        )
        counts = counts.to(self.context.device.torch_device)
        dist.all_reduce(counts, group=group)
        seen, bad = counts.tolist()
        if bad:  # known to all: the faults themselves travel only in steps that have some
            parts: list[list[SkippedSample]] = [[] for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(parts, skipped_samples, group=group)
            skipped_samples = [fault for part in parts for fault in part]
            self._list(skipped_samples, step)
        self.monitor.add(seen, skipped_samples)

    def _list(self, skipped_samples: list[SkippedSample], step: int) -> None:
        if self.context.rank != 0:
            return
        for fault in skipped_samples:
            if (fault.file, fault.index) in self.listed:
                continue
            self.listed.add((fault.file, fault.index))
            self.lines.add({"step": step, **asdict(fault)})
            LOGGER.warning("left out %s[%d]: %s", fault.file, fault.index, fault.reason)

    def close(self) -> None:
        """Close the file."""
        if self.context.rank == 0:
            self.lines.close()
