"""Runs checks one after the other on all ranks."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from moiie_megatron.selftest.check import FAIL, Check, Finding, Session, failed, skipped
from moiie_megatron.selftest.exchange import Exchange, combine
from moiie_megatron.selftest.report import Report
from moiie_megatron.selftest.watchdog import Watchdog

_WAIT_FOR_RANK_0 = 5.0  # seconds; a launcher ends all processes when the first of them fails


class Runner:
    """Runs every check, whatever the others find, and combines the findings of the ranks.

    Ranks do not wait for each other without end: a check that is over its time on some rank is a
    FAIL, the rest is skipped, and the process ends with code 1.

    Args:
        session: What the checks share.
        report: Gets every finding.
        exchange: For the main thread.
        watching: For the thread that ends checks which are stuck.
        clean_up: Called before the process is ended.
    """

    def __init__(
        self,
        session: Session,
        report: Report,
        exchange: Exchange,
        watching: Exchange,
        clean_up: Callable[[], None],
    ) -> None:
        self._session = session
        self._report = report
        self._exchange = exchange
        self._watching = watching
        self._clean_up = clean_up
        self._checks: Sequence[Check] = ()
        self._watchdog = Watchdog(self._expired, watching.any_error)

    def run(self, checks: Sequence[Check]) -> None:
        """Run the checks in order; every rank calls this with the same ones."""
        self._checks = checks
        self._watchdog.start()
        broken = None
        for check in checks:
            if broken:
                self._report.add(check.name, skipped(f"not run, because {broken} failed"))
                continue
            self._report.begin(check.name)
            with self._watchdog.limit(check.name, check.limit):
                self._exchange.post(check.name, self._run_here(check))
                finding = combine(self._exchange.all(check.name))
            if finding.status == FAIL:
                finding = replace(finding, reason=f"{finding.reason}: {check.remedy}")
            self._report.add(check.name, finding)
            if finding.fatal or (finding.status == FAIL and check.essential):
                broken = check.name
        self._report.finish()

    def _run_here(self, check: Check) -> Finding:
        """This rank's finding."""
        started = time.monotonic()
        unmet = check.unmet(self._session)
        if unmet is not None:
            return skipped(unmet)
        try:
            finding = check.run(self._session)
        except Exception as error:
            finding = replace(
                failed(f"{type(error).__name__} ({_first_line(error)})"),
                trace=traceback.format_exc(),
                fatal=not self._device_works(),
            )
        self._free_memory()
        return replace(finding, seconds=round(time.monotonic() - started, 2))

    def _device_works(self) -> bool:
        """Whether the GPU still answers: after some errors every later call fails."""
        if not self._session.is_cuda:
            return True
        try:
            torch.cuda.synchronize()
        except Exception:
            return False
        return True

    def _free_memory(self) -> None:
        gc.collect()  # models and optimizers form reference cycles
        if self._session.is_cuda and self._device_works():
            torch.cuda.empty_cache()

    def _expired(self, name: str, why: str) -> None:
        """A check is stuck; called from the watchdog's thread, ends the process."""
        if self._exchange.rank != 0:
            time.sleep(_WAIT_FOR_RANK_0)
            os._exit(1)
        names = [check.name for check in self._checks]
        check = self._checks[names.index(name)]
        here = self._watching.posted(name)
        missing = [str(rank) for rank in range(self._exchange.size) if rank not in here]
        reason = f"{why} on rank {', '.join(missing) or '0'}"
        errors = {rank: finding for rank, finding in here.items() if finding.trace}
        trace = ""
        if errors:
            rank = min(errors)
            reason, trace = f"rank {rank}: {errors[rank].reason}; {reason}", errors[rank].trace
        finding = replace(failed(f"{reason}: {check.remedy}"), seconds=check.limit, trace=trace)
        self._report.add(name, finding)
        for later in names[names.index(name) + 1 :]:
            self._report.add(later, skipped(f"not run, because {name} is stuck"))
        self._report.finish()
        self._clean_up()
        os._exit(1)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no message"
