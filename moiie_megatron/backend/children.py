"""Processes that a training process forks: they end when it ends, however it ends."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _EndWithParent:
    """Hooks around ``fork``: the kernel sends the child SIGKILL when its parent dies."""

    def __init__(self) -> None:
        self._parent = 0
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def before(self) -> None:
        self._parent = os.getpid()

    def in_child(self) -> None:
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._parent:  # died in between
            os._exit(1)


@functools.cache
def children_end_with_this_process() -> None:
    """From now on whatever this process forks cannot outlive it, not even SIGKILL.

    Workers of the data loader and the writers of checkpoints are such children, and so are
    theirs.  Without it a writer would go on into the folder that the restarted run sweeps up,
    and hold its output open.  Only the main thread may fork: the kernel counts the end of the
    forking *thread*.  Elsewhere than on Linux this does nothing.
    """
    if sys.platform == "linux":
        hooks = _EndWithParent()
        os.register_at_fork(before=hooks.before, after_in_child=hooks.in_child)
