"""A self-test of one process, with references that are at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.mcore.parallel import ParallelContext
from moiie_megatron.selftest.check import Check, Finding, Session
from moiie_megatron.selftest.exchange import Exchange
from moiie_megatron.selftest.report import Report
from moiie_megatron.selftest.runner import Runner


class Known:
    """References that were computed before."""

    def __init__(self, **records: dict[str, Tensor]) -> None:
        self.records = {name.replace("_", "-"): record for name, record in records.items()}

    def get(self, name: str) -> dict[str, Tensor]:
        return self.records[name]


def session(
    context: ParallelContext | None = None,
    directory: Path | None = None,
    **records: dict[str, Tensor],
) -> Session:
    return Session(DistEnv(), "cpu", True, directory, Known(**records), context)


def run_checks(checks: list[Check], file: Path, given: Session | None = None) -> dict[str, Any]:
    """Run checks in one process; return what the report says."""
    report = Report(0, {"device": "cpu"}, file)
    exchange = Exchange(dist.HashStore(), 0, 1)
    Runner(given or session(), report, exchange, exchange, lambda: None).run(checks)
    return json.loads(file.read_text())


def check(name: str, finding: Finding | Exception, **options: Any) -> Check:
    """A check with a given outcome."""

    def run(given: Session) -> Finding:
        if isinstance(finding, Exception):
            raise finding
        return finding

    return Check(name=name, about="", run=run, remedy="mend it", **options)
