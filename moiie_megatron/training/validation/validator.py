"""Measures the loss on the held-out samples, forward passes alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import torch
import torch.distributed as dist

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.batch import Batch
from moiie_megatron.data.stream.example import SkippedSample
from moiie_megatron.data.stream.held_out import HeldOut, held_out_rounds
from moiie_megatron.data.stream.skipped_samples import SkippedSampleMonitor
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.step import sum_losses
from moiie_megatron.training.validation.result import COUNTS, IMAGE_COUNTS, GroupSums, Validation
from moiie_megatron.training.validation.sample_groups import SampleGroups
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.progress import ProgressFn
from moiie_megatron.vlm.chunks import ModelChunks

LOGGER: Final = logging.getLogger(__name__)


class Validator:
    """The loss of a model on held-out samples; every rank makes the same calls.

    Nothing of a run changes: the model is left in its mode, and nothing is drawn at random.

    Args:
        config: The run; its micro-batches are the same without a backward pass.
        samples: The held-out samples.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, samples: HeldOut) -> None:
        self._config, self._context, self._samples = config, context, samples
        self._groups = SampleGroups(samples)
        self._named: set[SkippedSample] = set()

    def measure(
        self,
        model: ModelChunks,
        *,
        stop_flags: Callable[[], list[float]] = list,
        is_stopped: Callable[[list[float]], bool] = any,
        progress: ProgressFn | None = None,
    ) -> Validation | None:
        """The losses on all samples; every rank must be able to read all its weights.

        Args:
            stop_flags: Called after each round; its numbers are summed over all ranks.
            is_stopped: Given their sums, whether to leave off.
            progress: Called with the samples done and their total.

        Returns:
            Equal on all ranks, not checked; None if it has left off.

        Raises:
            UserError: Samples cannot be read at all.
        """
        begin = time.monotonic()
        number = self._groups.count
        sums = torch.zeros((1 + len(COUNTS)) * number, dtype=torch.float64)
        skipped: list[SkippedSample] = []
        for batches in held_out_rounds(
            self._config,
            self._samples,
            self._context,
            pin_memory=self._context.device.is_cuda,
            is_stopping=lambda: bool(any(stop_flags())),
        ):
            skipped += [sample for batch in batches for sample in batch.skipped_samples]
            counts = self._counts(batches)
            found = sum_losses(
                self._config,
                self._context,
                model,
                batches,
                groups=self._groups,
                also_sum=[*counts, *stop_flags()],
            ).cpu()
            sums += found[: len(sums)]
            flags = found[len(sums) :].tolist()
            if is_stopped(flags):
                return None
            if progress is not None:
                done = sums[number : 2 * number].sum()
                progress(int(done), len(self._samples))
        left_out = tuple(self._from_all(skipped))
        seconds = round(time.monotonic() - begin, 3)
        return Validation(self._parts(sums), seconds=seconds, skipped=left_out)

    def check(self, result: Validation) -> None:
        """Name the samples that could not be read, each once, and refuse too many of them.

        Raises:
            UserError: On all ranks: more than ``data.max_skipped_fraction`` allows, or all of a
                source.
        """
        for sample in result.skipped:
            if sample not in self._named and self._context.rank == 0:
                LOGGER.warning(
                    "validation leaves out %s[%d]: %s", sample.file, sample.index, sample.reason
                )
            self._named.add(sample)
        for number, (name, part) in enumerate(result.sources.items()):
            if not part.samples:
                file = str(self._samples.dataset.sources[number].records.path)
                first = next(sample for sample in result.skipped if sample.file == file)
                raise UserError(
                    f"None of the samples of data.validation.sources.{number} ({name}) can be "
                    f"read: correct its paths (the first: {first.reason})."
                )
        # All samples are there: no beginning that says little.
        monitor = SkippedSampleMonitor(self._config.data.max_skipped_fraction, minimum=0)
        monitor.add(result.total.samples, result.skipped)

    def _counts(self, batches: list[Batch]) -> list[float]:
        """The counts of this rank's part of the samples, each on one rank only."""
        counts = torch.stack([self._groups.counts(batch) for batch in batches]).sum(dim=0)
        groups = self._context.groups
        is_counting = groups.tp.rank() == 0 and self._context.is_last_stage
        flat: list[float] = (counts.flatten() * is_counting).tolist()
        return flat

    def _parts(self, sums: torch.Tensor) -> dict[str, list[GroupSums]]:
        columns = sums.view(1 + len(COUNTS), -1).t().tolist()
        parts = [GroupSums(loss, *map(int, counts)) for loss, *counts in columns]
        size = len(IMAGE_COUNTS)
        return {
            name: parts[size * source : size * (source + 1)]
            for source, name in enumerate(self._samples.names)
        }

    def _from_all(self, skipped: list[SkippedSample]) -> list[SkippedSample]:
        """What the data-parallel ranks could not read, in the order of the samples."""
        group = self._context.groups.dp
        gathered: list[list[SkippedSample]] = [[]] * dist.get_world_size(group)
        dist.all_gather_object(gathered, skipped, group=group)
        files = {str(one.records.path): i for i, one in enumerate(self._samples.dataset.sources)}
        found = [sample for part in gathered for sample in part]
        return sorted(found, key=lambda one: (files.get(one.file, -1), one.index))
