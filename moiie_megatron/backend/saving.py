"""Saving a checkpoint without a helper process that outlives the run."""

from __future__ import annotations

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async


def write_without_manager() -> None:
    """Let Megatron-Core's writer report its results through a queue inside this process.

    For asynchronous saves Megatron starts a ``multiprocessing`` manager on the first save.  Ours
    are synchronous, so writer and reader of that queue are one process; the manager would cost
    seconds to start and, when the run is killed, live on and keep its output open (a pipe behind
    torchrun would never end).  Repeated calls change nothing.
    """
    # None until the first save; versions without this name start no manager.
    if getattr(filesystem_async, "_results_queue", queue) is None:
        filesystem_async._results_queue = queue.Queue()
