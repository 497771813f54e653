"""How ranks learn of each other's findings: over the key-value store, not over collectives.

A finding must come through even where collectives are what is broken.
"""

from __future__ import annotations

import json
import time
from typing import Final

from torch.distributed import Store

from moiie_megatron.selftest.check import FAIL, SKIP, Finding

_POLL: Final = 0.02  # seconds
_LAST_WAIT: Final = 30.0  # seconds
_OVER: Final = "over"


class Exchange:
    """The findings of all ranks.

    Args:
        store: Shared by all ranks.  A thread needs an exchange with a connection of its own: a
            call that waits holds the connection.
        rank: Of this process.
        size: Number of ranks.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self.rank = rank
        self.size = size

    def post(self, check: str, finding: Finding) -> None:
        """Publish this rank's finding."""
        self._store.set(_key(check, self.rank), json.dumps(finding.as_dict()))
        if finding.trace:
            self._store.set(_trace_key(check), str(self.rank))

    def posted(self, check: str) -> dict[int, Finding]:
        """The findings that are there by now, by rank."""
        found = {}
        for rank in range(self.size):
            key = _key(check, rank)
            if self._store.check([key]):
                found[rank] = Finding(**json.loads(self._store.get(key)))
        return found

    def any_error(self, check: str) -> bool:
        """Whether a rank left the check with an unexpected error, so that others may wait."""
        return bool(self._store.check([_trace_key(check)]))

    def all(self, check: str) -> dict[int, Finding]:
        """The findings of all ranks; waits for them without a limit of its own."""
        keys = [_key(check, rank) for rank in range(self.size)]
        while not self._store.check(keys):
            time.sleep(_POLL)
        return self.posted(check)

    def leave_together(self) -> None:
        """Wait until rank 0 has told everything: a launcher ends it when another rank fails."""
        if self.rank == 0:
            self._store.set(_OVER, "")
            return
        deadline = time.monotonic() + _LAST_WAIT
        try:
            while not self._store.check([_OVER]) and time.monotonic() < deadline:
                time.sleep(_POLL)
        except RuntimeError:  # rank 0 held the store and is gone
            return


def _key(check: str, rank: int) -> str:
    return f"{check}/{rank}"


def _trace_key(check: str) -> str:
    return f"{check}/error"


def combine(findings: dict[int, Finding]) -> Finding:
    """One finding for all ranks: a FAIL on any of them is a FAIL.

    Reason and figures are those of the first rank that failed, or of rank 0.
    """
    by_status = {
        status: rank
        for status in (FAIL, SKIP)
        for rank in sorted(findings, reverse=True)
        if findings[rank].status == status
    }
    rank = by_status.get(FAIL, by_status.get(SKIP, 0))
    chosen = findings[rank]
    prefix = f"rank {rank}: " if chosen.status == FAIL and len(findings) > 1 else ""
    return Finding(
        chosen.status,
        prefix + chosen.reason,
        chosen.figures,
        fatal=any(finding.fatal for finding in findings.values()),
        seconds=max(finding.seconds for finding in findings.values()),
        trace=chosen.trace,
    )
