"""Python processes that start at once: forks of one process that has the packages imported.

Importing torch, transformers and Megatron takes several seconds, most runs of the tests less than
one.  The server (this file as a script) imports them once for the whole test session; its
executable stands in for Python, and in a fork ``sys.executable`` names it too, so that torchrun
and the tools start their processes the same way.  Every script runs in a process of its own, as
Python would run it; only the imports are shared.

It is started by ``MOIIE_TEST_FORKS=1`` alone: forks hide what a start of Python shows (the order
of imports, variables that are read while importing, the parent of a process).

A fork leads a session of its own.  ``forks/``, beside the executable, holds a link for every
fork from its process id to its client's (``launch.descendants`` reads that).
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path

CLIENT = Path(__file__).with_name("fork_client.py")
# Read while packages are imported: a start with other values is left to Python.
KEPT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED")
KEPT += ("HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MOIIE_TEST_TE")
SHARED = (
    "torch.distributed.launcher.api",  # most of torchrun
    "matplotlib.pyplot",
    "moiie_megatron.training.loop",
    "moiie_megatron.generation.generator",
)


class ForkServer:
    """The server of a directory: any process of a test session may start it, one does.

    It ends with the process that has made the directory its own (``own``), however that ends.

    Attributes:
        executable: What to use as Python.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.executable = directory / "python"

    def own(self) -> None:
        """Make this process the owner; before the first ``start``."""
        (self.directory / "owner").write_text(str(os.getpid()))

    def start(self, environment: dict[str, str]) -> None:
        """Start the server, unless it runs already."""
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.directory / "pid").exists():
                (self.directory / "pid").write_text(str(self._start(environment)))

    def _start(self, environment: dict[str, str]) -> int:
        address = self.directory / "python.socket"
        text = CLIENT.read_text().replace("@PYTHON@", sys.executable)
        # -IS: nothing but the standard library is looked for, which is most of a start's time.
        text = f"#!{sys.executable} -IS\n{text.replace('@SOCKET@', str(address))}"
        self.executable.write_text(text)
        self.executable.chmod(0o755)
        (self.directory / "forks").mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            # Early clients wait here until the imports are done.
            listener.bind(str(address))
            listener.listen(100)
            words = [sys.executable, __file__, str(listener.fileno()), str(self.executable)]
            words.append((self.directory / "owner").read_text())
            return subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            ).pid

    def stop(self) -> None:
        """End the server and its forks."""
        if (self.directory / "pid").exists():
            with suppress(ProcessLookupError):
                os.kill(int((self.directory / "pid").read_text()), signal.SIGTERM)


class _Server:
    """Clients and their forks; one thread, because a process with several cannot fork."""

    def __init__(self, listener: socket.socket, executable: Path, owner: int) -> None:
        self.listener = listener
        self.executable = executable
        self.forks: dict[int, tuple[int, socket.socket]] = {}  # by pid: descriptor and client
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self.accept)
        self.owner = os.pidfd_open(owner)  # readable when it has ended
        self.selector.register(self.owner, selectors.EVENT_READ, sys.exit)

    def serve(self) -> None:
        """Until SIGTERM or the owner's end, which no fork survives."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            while True:
                for key, _ in self.selector.select():
                    key.data()
        finally:
            for pid in self.forks:
                os.kill(pid, signal.SIGKILL)

    def accept(self) -> None:
        """Fork for a client."""
        client, _ = self.listener.accept()
        header, streams, _, _ = socket.recv_fds(client, 8, 3)
        size = struct.unpack("!q", header)[0] if header else 1
        message = client.recv(size, socket.MSG_WAITALL)
        question = json.loads(message) if len(message) == size else None  # None: already killed
        pid = 0
        if question and all(question["environment"].get(n) == os.environ.get(n) for n in KEPT):
            pid = os.fork()
            if not pid:
                self.leave()
                client.close()
                _become(question, streams, str(self.executable))
        for stream in streams:
            os.close(stream)
        if pid:
            peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            self.link(pid).symlink_to(str(struct.unpack("3i", peer)[0]))
        with suppress(BrokenPipeError):
            client.sendall(struct.pack("!q", pid))
        if not pid:
            client.close()
            return
        descriptor = os.pidfd_open(pid)
        self.forks[pid] = descriptor, client
        self.selector.register(descriptor, selectors.EVENT_READ, partial(self.report, pid))
        self.selector.register(client, selectors.EVENT_READ, partial(self.kill, pid))

    def report(self, pid: int) -> None:
        """A fork has ended: its client ends the same way."""
        descriptor, client = self.forks.pop(pid)
        self.link(pid).unlink()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.selector.unregister(descriptor)
        os.close(descriptor)
        if client.fileno() >= 0:
            self.selector.unregister(client)
            with suppress(BrokenPipeError):
                client.sendall(struct.pack("!q", code))
            client.close()

    def kill(self, pid: int) -> None:
        """A client is gone, and its fork with it."""
        if pid in self.forks:
            os.kill(pid, signal.SIGKILL)
            client = self.forks[pid][1]
            self.selector.unregister(client)
            client.close()

    def link(self, pid: int) -> Path:
        return self.executable.with_name("forks") / str(pid)

    def leave(self) -> None:
        """Close what a fork has inherited."""
        self.selector.close()
        self.listener.close()
        os.close(self.owner)
        for descriptor, client in self.forks.values():
            os.close(descriptor)
            client.close()


def _become(question: dict[str, object], streams: list[int], executable: str) -> None:
    """Run what the client asks for, as Python would; never returns."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    ours = os.environ["PYTHONPATH"].split(os.pathsep)
    words, environment, folder = question["words"], question["environment"], question["folder"]
    assert isinstance(words, list) and isinstance(environment, dict) and isinstance(folder, str)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.executable = executable
    path = [*environment.get("PYTHONPATH", "").split(os.pathsep), *sys.path[1:]]
    sys.path[1:] = [entry for entry in path if entry and entry not in ours] + ours
    code = 0
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], folder
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            exec(compile(words[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).absolute().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # The order of a normal end.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    for name in SHARED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, every page in every fork
    _Server(listener, Path(sys.argv[2]), int(sys.argv[3])).serve()


if __name__ == "__main__":
    main()
