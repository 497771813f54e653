"""Skipped samples of the whole run: counted over all ranks, each listed once.

``skipped_samples.jsonl`` in the output directory has one line per record that could not be used,
with the step that met it first: ``{"step", "file", "index", "reason"}``.

What is noticed about samples that are used is logged once per source, and counted at the end.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Final, TypeVar

import torch
import torch.distributed as dist

from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import Notice, SkippedSample
from moiie_megatron.data.stream.skipped_samples import SkippedSampleMonitor
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.logging.jsonl import LostFn, StepLines, complete_lines, refuse

LOGGER: Final = logging.getLogger(__name__)
_T = TypeVar("_T")
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
        self.notices: Counter[Notice] = Counter()  # of this rank; keys of all ranks
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
        notices = Counter(notice for batch in batches for notice in batch.notices)
        new = [notice for notice in notices if notice not in self.notices]
        used = sum(len(batch.record_ids) for batch in batches)
        counts = torch.tensor([used, len(skipped), len(new)])
        counts = counts.to(self.context.device.torch_device)
        dist.all_reduce(counts, group=group)
        num_used, num_skipped, num_new = counts.tolist()
        if num_new:
            for notice in sorted(set(self._from_all(new)), key=str):
                self.notices[notice] += 0
                self._log("%s: %s", notice.source, notice.what)
        self.notices.update(notices)
        if num_skipped:  # equal on all ranks: the samples travel only in steps that have some
            skipped = self._from_all(skipped)
            self._list(skipped, step)
        self.monitor.add(num_used, skipped)

    def _from_all(self, values: list[_T]) -> list[_T]:
        group = self.context.groups.dp
        parts: list[list[_T]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(parts, values, group=group)
        return [value for part in parts for value in part]

    def _log(self, text: str, *values: object) -> None:
        if self.context.rank == 0:
            LOGGER.warning(text, *values)

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
        """Log the counts of what was noticed and close the file; every rank calls this."""
        if self.notices:  # equal keys on all ranks
            counts: Counter[Notice] = Counter()
            for part in self._from_all([dict(self.notices)]):
                counts.update(part)
            for notice, count in sorted(counts.items(), key=str):
                self._log("%s: %d samples: %s", notice.source, count, notice.what)
        if self.context.rank == 0:
            self.lines.close()
