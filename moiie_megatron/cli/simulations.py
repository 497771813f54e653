"""Simulations of ranks in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.plans.jobs import Job, Outcome
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.progress import ProgressFn


class Simulations:
    """Runs simulations in a pool of processes.

    Attributes:
        progress: Told after every simulation how many are done, and how many are known of.
    """

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.progress: ProgressFn | None = None
        self._pool = pool
        self._done = self._known = 0

    def __call__(self, jobs: Sequence[Job]) -> list[Outcome]:
        self._known += len(jobs)
        outcomes: list[Outcome] = []
        for outcome in self._pool.map(simulate_job, jobs):
            outcomes.append(outcome)
            self._done += 1
            if self.progress is not None:
                self.progress(self._done, self._known)
        return outcomes


@contextmanager
def simulations(processes: int) -> Iterator[Simulations]:
    """Start processes for simulations; they end with the block.

    Must be entered before torch is imported and before there are threads: the processes are
    forked.

    Args:
        processes: How many run at a time; each needs about 1 GB of memory.
    """
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, initializer=_prepare)
    try:
        pool.submit(int).result()  # starts all of them
        yield Simulations(pool)
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()  # they hold nothing
        # Waits for the thread that talks to them: at the end of the program it would fail.
        pool.shutdown(cancel_futures=True)


def simulate_job(job: Job) -> Outcome:
    """Simulate one rank in this process; an error of the configuration is returned."""
    from moiie_megatron.simulation.rank import simulate_rank

    try:
        return simulate_rank(
            as_planned(job.config),
            world=job.world,
            rank=job.rank,
            workload=job.workload,
            routing=job.routing,
        )
    except UserError as error:
        return error


def as_planned(config: RunConfig) -> RunConfig:
    """The run on GPUs with Megatron-Core's local modules, which any machine can build."""
    changes = {"device": "cuda", "transformer_impl": "local"}
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _prepare() -> None:
    """Set up a process that simulates: one thread, no advice for GPUs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
