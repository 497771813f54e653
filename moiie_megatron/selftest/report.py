"""The report: a line per check as soon as it is over, and a JSON file that grows with it."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from moiie_megatron.selftest.check import FAIL, PASS, Finding
from moiie_megatron.utils.files import atomic_write


class Report:
    """What rank 0 tells; on other ranks every method does nothing.

    The file is written before every check too, with the verdict that holds if the process dies in
    it.

    Args:
        rank: Of this process.
        settings: How the self-test was started; part of the file.
        file: The JSON report, or None.
        stream: Where the lines go; None is standard output.
    """

    def __init__(
        self,
        rank: int,
        settings: dict[str, Any],
        file: Path | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._is_active = rank == 0
        self._settings = settings
        self._file = file
        self._stream = stream
        self._started = time.monotonic()
        self.findings: dict[str, Finding] = {}

    @property
    def status(self) -> str:
        """FAIL if any check failed, else PASS."""
        failures = any(finding.status == FAIL for finding in self.findings.values())
        return FAIL if failures else PASS

    def begin(self, check: str) -> None:
        """A check starts."""
        self.findings[check] = Finding(FAIL, "the process ended during this check")
        self._write()

    def add(self, check: str, finding: Finding) -> None:
        """A check is over."""
        self.findings[check] = finding
        if not self._is_active:
            return
        seconds = f"{finding.seconds:.1f} s"
        self._print(f"{finding.status}  {check:<16}{seconds:>8}  {finding.reason}")
        if finding.trace:
            self._print(finding.trace.rstrip())
        self._write()

    def finish(self) -> None:
        """The last line."""
        if not self._is_active:
            return
        counts = Counter(finding.status for finding in self.findings.values())
        parts = [f"{counts[status]} {status}" for status in ("PASS", "FAIL", "SKIP")]
        self._print(f"{', '.join(parts)} in {time.monotonic() - self._started:.0f} s")
        self._write()

    def _print(self, line: str) -> None:
        print(line, file=self._stream or sys.stdout, flush=True)

    def _write(self) -> None:
        if self._file is None or not self._is_active:
            return
        content = {
            "status": self.status,
            "seconds": round(time.monotonic() - self._started, 1),
            **self._settings,
            "checks": {name: finding.as_dict() for name, finding in self.findings.items()},
        }
        with atomic_write(self._file) as path:
            path.write_text(json.dumps(content, indent=1) + "\n")
