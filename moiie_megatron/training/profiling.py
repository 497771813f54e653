"""Traces of chosen steps on chosen ranks; nothing at all for the others."""

from __future__ import annotations

import os
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.mcore.parallel import ParallelContext


class StepProfiler:
    """torch's profiler around the steps ``profile.steps`` on the ranks ``profile.ranks``.

    The trace is ``OUTPUT/profile/steps_A-B_rank_R.json`` (chrome://tracing, Perfetto).
    """

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        self._steps = config.profile.steps if context.rank in config.profile.ranks else None
        self._rank = context.rank
        self._folder = Path(config.output) / "profile"
        self._cuda = context.device.is_cuda
        self._running: profile | None = None
        self._first = 0

    def before(self, step: int) -> None:
        """Start where the traced steps begin, or in them when a run is resumed there."""
        if self._steps is None or self._running or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        self._running, self._first = profile(activities=activities), step
        self._running.start()

    def after(self, step: int, *, last: bool) -> None:
        """Write the trace after the last traced step, or the last of the run."""
        if self._running is None or not (last or step == self._steps[1]):
            return
        self._running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._folder / f"steps_{self._first}-{step}_rank_{self._rank}.json"
        beside = final.with_suffix(".writing.json")
        self._running.export_chrome_trace(str(beside))
        os.replace(beside, final)
        self._running = None
