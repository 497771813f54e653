"""Traces of some steps on some ranks."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.training.logging.jsonl import LostFn, lost_sentence, refuse
from moiie_megatron.utils.files import atomic_write


class StepProfiler:
    """torch's profiler around the steps ``profile.steps`` on the ranks ``profile.ranks``.

    The trace is ``OUTPUT/profile/steps_A-B_rank_R.json`` (chrome://tracing, Perfetto).

    Args:
        lost: Told about a trace that could not be written.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, lost: LostFn = refuse) -> None:
        self._lost = lost
        self._steps = config.profile.steps if context.rank in config.profile.ranks else None
        self._rank = context.rank
        self._directory = Path(config.output) / "profile"
        self._cuda = context.device.is_cuda
        self._running: profile | None = None
        self._first = 0

    def before(self, step: int) -> None:
        """Start at the first traced step, or at a later one if the run resumes there."""
        if self._steps is None or self._running or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        self._running, self._first = profile(activities=activities), step
        self._running.start()

    def after(self, step: int, *, last: bool) -> None:
        """Write the trace after the last traced step, or after the run's ``last`` step."""
        if self._running is None or self._steps is None:
            return
        if not last and step != self._steps[1]:
            return
        self._running.stop()
        final = self._directory / f"steps_{self._first}-{step}_rank_{self._rank}.json"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with atomic_write(final) as file:
                self._running.export_chrome_trace(str(file))
        except OSError as error:
            self._lost(lost_sentence(final, error))
        self._running = None
