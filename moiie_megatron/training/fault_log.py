"""Samples that were left out, seen from the whole run: counted over all ranks, listed once.

``faults.jsonl`` in the run's output folder has one line per record that could not be used, with
the step that met it first: ``{"step", "file", "index", "reason"}``.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from moiie_megatron.backend.parallel import World
from moiie_megatron.checkpoint.store import Progress
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.batch import Batch
from moiie_megatron.data.faults import Fault, FaultMonitor
from moiie_megatron.training.jsonl import StepLines, complete_lines

LOGGER: Final = logging.getLogger(__name__)
FAULTS_FILE: Final = "faults.jsonl"


class FaultLog:
    """Counts on every rank, writes on rank 0.

    A resumed run goes on counting from its checkpoint and drops what was written after it.

    Args:
        progress: Where the run starts.
    """

    def __init__(self, config: RunConfig, world: World, progress: Progress) -> None:
        self.world = world
        self.monitor = FaultMonitor(
            config.data.max_bad_share, good=progress.consumed_samples, bad=progress.bad_samples
        )
        self.listed: set[tuple[str, int]] = set()
        if world.rank == 0:
            path = Path(config.output) / FAULTS_FILE
            self.lines = StepLines(path, progress.step)
            self.listed = {(line["file"], line["index"]) for line in complete_lines(path)}

    @property
    def bad(self) -> int:
        """Samples left out so far on all data-parallel ranks, repeats included."""
        return self.monitor.bad

    def add(self, batches: list[Batch], step: int) -> None:
        """Take in this rank's micro-batches of a step; every rank calls this.

        Raises:
            ValueError: Too many samples are bad (``FaultMonitor``); alike on all ranks.
        """
        faults = [fault for batch in batches for fault in batch.faults]
        group = self.world.groups.dp
        counts = torch.tensor([sum(len(batch.record_ids) for batch in batches), len(faults)])
        counts = counts.to(self.world.device.torch_device)
        dist.all_reduce(counts, group=group)
        seen, bad = counts.tolist()
        if bad:  # known to all: the faults themselves travel only in steps that have some
            parts: list[list[Fault]] = [[] for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(parts, faults, group=group)
            faults = [fault for part in parts for fault in part]
            self._list(faults, step)
        self.monitor.add(seen, faults)

    def _list(self, faults: list[Fault], step: int) -> None:
        if self.world.rank != 0:
            return
        for fault in faults:
            if (fault.file, fault.index) in self.listed:
                continue
            self.listed.add((fault.file, fault.index))
            self.lines.add({"step": step, **asdict(fault)})
            LOGGER.warning("left out %s[%d]: %s", fault.file, fault.index, fault.reason)

    def close(self) -> None:
        """Close the file."""
        if self.world.rank == 0:
            self.lines.close()
