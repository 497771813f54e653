"""Signal handling of the worker processes that read samples."""

from __future__ import annotations

import os
import signal
import threading

# Sent to all processes of a job that should save and exit (training/stop.py).
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


def ignore_group_signals(worker_id: int) -> None:
    """``worker_init_fn``: exit on SIGTERM from the training process, ignore it from any other.

    Launchers and cluster managers signal whole process groups, but the running step still needs
    its samples.  torch's own handler would end the worker, and with it the run.
    """
    del worker_id
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def _exit_on_parents_sigterm() -> None:
    while True:
        received = signal.sigwaitinfo(_STOP_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
            os._exit(0)
