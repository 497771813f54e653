"""What a process that reads samples does with signals."""

from __future__ import annotations

import os
import signal
import threading

# Sent to all processes of a job when it shall save and end (training/stop.py).
_STOP = {signal.SIGTERM, signal.SIGUSR1}


def ignore_group_signals(worker_id: int) -> None:
    """``worker_init_fn``: end at SIGTERM from the process that trains, not from anybody else.

    Launchers and cluster managers signal whole groups of processes; the step under way must
    still get its samples.  torch's own handler would end the worker, and with it the run.
    """
    del worker_id
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while True:
        found = signal.sigwaitinfo(_STOP)
        if found.si_signo == signal.SIGTERM and found.si_pid == os.getppid():
            os._exit(0)
