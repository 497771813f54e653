"""Where a run starts: at step 0, or at the newest checkpoint in its output directory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moiie_megatron.checkpoint.find_latest import agree_on_newest, newest_whole
from moiie_megatron.checkpoint.progress import Progress
from moiie_megatron.checkpoint.save_load import load_common
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.build import build_dataset
from moiie_megatron.data.stream.dataset import LlavaDataset
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.identity import check_same_run, run_identity

if TYPE_CHECKING:
    from moiie_megatron.data.stream.energon import EnergonDataset


@dataclass(frozen=True)
class RunStart:
    """Where a run starts.

    Attributes:
        dataset: All samples of the run.
        total_steps: Optimizer steps of the whole run.
        checkpoint: Where it goes on from; None at its first start.
        progress: How far it is, with the identity of the present run.
    """

    dataset: LlavaDataset | EnergonDataset
    total_steps: int
    checkpoint: Path | None
    progress: Progress

    @property
    def is_finished(self) -> bool:
        """Whether no step is left."""
        return self.progress.step >= self.total_steps


def find_start(config: RunConfig, context: ParallelContext) -> RunStart:
    """Open the data and look for a checkpoint; every rank calls this.

    Raises:
        UserError: The data cannot be used, all checkpoints are damaged, or the newest one is of
            another run (``check_same_run``).
    """
    dataset = build_dataset(config)
    steps = total_steps(config, dataset.blend.epoch_size)
    checkpoint = agree_on_newest(config.output, context)
    identity = run_identity(config, dataset.blend, steps, context.dp_size)
    progress = Progress(step=0, consumed_samples=0, identity=identity)
    if checkpoint is not None:
        saved = Progress.from_state(load_common(checkpoint)["progress"])
        check_same_run(saved.identity, identity, checkpoint)
        progress = replace(saved, identity=identity)
    return RunStart(dataset, steps, checkpoint, progress)


def total_steps(config: RunConfig, epoch_size: int) -> int:
    """Optimizer steps of the whole run.

    Args:
        epoch_size: Samples per epoch.
    """
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, math.ceil(config.train.epochs * epoch_size / config.train.global_batch_size))


def steps_done(config: RunConfig) -> tuple[int, int]:
    """Steps of the newest checkpoint of a run (0 without one), and of the whole run.

    Raises:
        UserError: The data, whose size counts in epochs, or all checkpoints are damaged.
    """
    newest, _ = newest_whole(config.output)
    done = 0 if newest is None else int(load_common(newest)["progress"]["step"])
    # Records take a while to read: only where the steps follow from them.
    epoch_size = build_dataset(config).blend.epoch_size if config.train.steps is None else 0
    return done, total_steps(config, epoch_size)
