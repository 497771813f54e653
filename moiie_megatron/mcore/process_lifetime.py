"""Tie child processes to this process's lifetime, and this process to the torchrun agent.

Linux only: the kernel's ``PR_SET_PDEATHSIG``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _ForkHooks:
    """Hooks around ``fork`` that make the kernel kill the child when its parent dies."""

    def __init__(self) -> None:
        self._parent = 0
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def die_with_parent(self) -> None:
        """Let the kernel send SIGKILL to this process when its parent ends."""
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def before(self) -> None:
        self._parent = os.getpid()

    def in_child(self) -> None:
        self.die_with_parent()
        if os.getppid() != self._parent:  # the parent has died in between
            os._exit(1)


@functools.cache
def kill_children_on_exit() -> None:
    """Kill the forked children of this process when it ends, even when it is killed.

    Applies to children that are forked after this call, and to their children: data loader
    workers and checkpoint writers.  A writer that lived on would write into a directory that the
    restarted run deletes, and hold the run's output open.  Fork from the main thread only: the
    kernel watches the *thread* that forked.

    A process that torchrun has started directly is also killed when its agent ends: the other
    agents restart the run, and the process would still hold its GPU.

    Does nothing on other systems than Linux; repeated calls change nothing.
    """
    if sys.platform == "linux":
        hooks = _ForkHooks()
        os.register_at_fork(before=hooks.before, after_in_child=hooks.in_child)
        # torchrun starts every process in a session of its own.
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getsid(0) == os.getpid():
            hooks.die_with_parent()


def start_child(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start another program that is killed when this process ends, even when it is killed.

    It has a session of its own, so that a Ctrl-C in the terminal reaches this process alone.

    Args:
        options: Of ``subprocess.Popen``.
    """
    kill_children_on_exit()
    # Only with a function to call after the fork does Python call the hooks above; the kernel
    # keeps what they set when the program is replaced.
    return subprocess.Popen(command, start_new_session=True, preexec_fn=_nothing, **options)


def run_child(command: Sequence[str]) -> str:
    """The standard output of another program, which is killed when this process ends.

    Raises:
        subprocess.CalledProcessError: It has failed.
    """
    with start_child(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            output: str = child.communicate()[0]
        except BaseException:  # a signal, also Ctrl-C: the with block would wait for the child
            child.kill()
            raise
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, list(command))
    return output


def stop_launcher(launcher: subprocess.Popen[Any], number: signal.Signals, seconds: float) -> None:
    """Send a signal to the ranks that torchrun has started, and end it when they have ended.

    Args:
        launcher: torchrun, or a program that starts no others.
        seconds: After which all are killed.
    """
    if launcher.poll() is None:
        process = psutil.Process(launcher.pid)
        process.suspend()  # it would report its ranks as failed
        waiting = process.children() or [process]
        if waiting == [process]:
            process.resume()
        for one in waiting:
            one.send_signal(number)
        deadline = time.monotonic() + seconds
        while any(map(_is_alive, waiting)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for one in waiting:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    launcher.kill()
    launcher.wait()


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _nothing() -> None:
    return None
