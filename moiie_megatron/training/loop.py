"""A run from its configuration to its last checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.evaluation_process import evaluation_process
from moiie_megatron.training.garbage import collect_every
from moiie_megatron.training.output_lock import locked_output
from moiie_megatron.training.resume import find_start
from moiie_megatron.training.run import Run
from moiie_megatron.training.stop import StopRequest

LOGGER: Final = logging.getLogger(__name__)


def train(config: RunConfig, context: ParallelContext, stop: StopRequest | None = None) -> Path:
    """Train, or go on with a run that was interrupted; every rank calls this.

    Args:
        stop: Checked after every step: whether to save and end early; its reason is set then.

    Returns:
        The last checkpoint.

    Raises:
        UserError: Another run writes to the output directory, data, weights or checkpoints do
            not fit the configuration, a checkpoint or log cannot be written, or too many samples
            or steps were skipped.
    """
    start = find_start(config, context)
    if start.is_finished and start.checkpoint is not None:
        LOGGER.info("%s already is the end of this run: nothing to do.", start.checkpoint)
        return start.checkpoint
    stop = stop or StopRequest()
    with locked_output(config.output, context):
        run = Run(config, context, start, stop)
        with (
            evaluation_process(config, context) as evaluation,
            stop.taking_steps(),
            collect_every(config.train.gc_interval) as collect,
        ):
            run.validate_before()
            while not run.is_over:
                batches = run.next_batches()
                result = run.step(batches)
                run.report(batches, result)
                evaluation.check()
                run.save_if_due()
                run.validate_if_due()
                collect(run.progress.step)
            run.complete()
            if stop.reason is None:
                evaluation.wait(stop)
            return run.finish()
