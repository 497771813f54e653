"""The process that evaluates a run's checkpoints beside it (``cli/watch.py``).

It may not cost the run anything: it has the lowest priority and few threads, no GPU unless asked
for, it is the first that the kernel kills when memory is short, and the run goes on without it.  It
ends with the run, even when that is killed.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.mcore.process_lifetime import start_child
from moiie_megatron.training.stop import StopRequest

LOGGER: Final = logging.getLogger(__name__)
LOG_FILE: Final = "evaluation.log"
_PROGRAM: Final = "moiie_megatron.cli.watch"
_POLL: Final = 0.5  # seconds
_ENDING: Final = 5.0  # seconds to end in
# What launchers set for the ranks of a run.
_OF_RANKS: Final = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


@contextmanager
def evaluation_process(config: RunConfig, context: ParallelContext) -> Iterator[EvaluationProcess]:
    """The process of a run that wants one, from here to the end of the block; all ranks call this.

    ``config.yaml`` must be in the output directory.
    """
    process = EvaluationProcess(config, context)
    try:
        yield process
    finally:
        process.stop()


class EvaluationProcess:
    """Rank 0 has the process; without ``evaluation.interval`` and ``evaluation.process`` nobody.

    Args:
        config: The run's.
        context: Every rank makes the same calls.
    """

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        self._evaluation, self._context = config.evaluation, context
        self._is_wanted = config.evaluation.interval > 0 and config.evaluation.process
        self._log = Path(config.output) / LOG_FILE
        self._process: subprocess.Popen[bytes] | None = None
        self._is_told = False
        if self._is_wanted and context.rank == 0:
            self._process = self._start(config.output)

    def check(self) -> None:
        """Warn, once, if the process has failed; the run does not depend on it."""
        code = None if self._process is None else self._process.poll()
        if code and not self._is_told:
            self._is_told = True
            LOGGER.warning(
                "The process that evaluates has ended with code %d (%s): the run goes on "
                "without it; %s has more.",
                code,
                _last_line(self._log),
                self._log,
            )

    def wait(self, stop: StopRequest) -> None:
        """At the end of a run that is finished, wait for what is left to evaluate; a collective.

        Args:
            stop: A signal ends the wait.
        """
        if not self._is_wanted or not self._evaluation.wait_minutes:
            return
        deadline = time.monotonic() + 60 * self._evaluation.wait_minutes
        is_told = False
        while True:
            is_over = self._process is None or self._process.poll() is not None
            is_late = time.monotonic() > deadline
            ends = (self._context.rank == 0 and (is_over or is_late)) or any(stop.flags(None))
            total = torch.tensor(int(ends), device=self._context.device.torch_device)
            dist.all_reduce(total)
            if int(total):
                break
            if not is_told:
                is_told = True
                LOGGER.info(
                    "Waiting at most %g minutes for evaluations (evaluation.wait_minutes).",
                    self._evaluation.wait_minutes,
                )
            time.sleep(_POLL)
        self.check()
        if self._process is not None and self._process.poll() is None:
            LOGGER.warning(
                "Not all checkpoints are evaluated: tools/evaluate.py --watch %s does the rest.",
                self._log.parent,
            )

    def stop(self) -> None:
        """End the process, wherever it is."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self, output: str) -> subprocess.Popen[bytes] | None:
        evaluation = self._evaluation
        device = "cpu" if evaluation.device == "auto" else evaluation.device
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_OF_RANKS)}
        environment["OMP_NUM_THREADS"] = str(evaluation.threads)
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", _PROGRAM, "--low-priority", output]
        command += [f"evaluation.device={device}"]
        try:
            with self._log.open("ab") as log:
                return start_child(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        except OSError as error:
            LOGGER.warning("The process that evaluates could not be started (%s).", error)
            return None


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][:500].rstrip(".") if lines else "it has said nothing"
