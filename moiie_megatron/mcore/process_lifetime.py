"""Processes that a training process forks end when it ends, however it ends; and it ends with
the launcher that has started it.
"""

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

    def end_with_parent(self) -> None:
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def before(self) -> None:
        self._parent = os.getpid()

    def in_child(self) -> None:
        self.end_with_parent()
        if os.getppid() != self._parent:  # died in between
            os._exit(1)


@functools.cache
def kill_children_on_exit() -> None:
    """From now on whatever this process forks cannot outlive it, not even SIGKILL.

    Workers of the data loader and the writers of checkpoints are such children, and so are
    theirs.  Without it a writer would go on into the folder that the restarted run sweeps up,
    and hold its output open.  Only the main thread may fork: the kernel counts the end of the
    forking *thread*.

    Started by torchrun itself, not by a script in between, this process also ends with its agent:
    the other agents start the run anew, and it would still hold the GPU.  Elsewhere than on Linux
    nothing of this is done.
    """
    if sys.platform == "linux":
        hooks = _EndWithParent()
        os.register_at_fork(before=hooks.before, after_in_child=hooks.in_child)
        # torchrun gives every process that it starts a session.
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getsid(0) == os.getpid():
            hooks.end_with_parent()
