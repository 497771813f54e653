"""vLLM's OpenAI-compatible server in processes of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

NAME = "demo"
# So that what a process holds is what it uses: large buffers go back to the system when they are
# freed, and oneDNN, which prepares every product anew for each number of tokens, keeps few of them.
STEADY_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
}


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    port: int
    process: psutil.Process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def processes(self) -> list[psutil.Process]:
        """The server and what it has started."""
        return [self.process, *self.process.children(recursive=True)]

    def megabytes(self) -> float:
        """Memory of all processes that is theirs alone."""
        return sum(process.memory_full_info().uss for process in self.processes()) / 2**20

    def descriptors(self) -> int:
        """Open files and sockets of all processes."""
        return sum(process.num_fds() for process in self.processes())

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            text = response.read().decode()
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert values, name
        return sum(map(float, values))


@contextmanager
def serving(folder: Path, log: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """Serve an export; afterwards no process of the server is left.

    Args:
        log: File that gets the output of the server.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", NAME, "--trust-remote-code", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    environment = os.environ | STEADY_MEMORY
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    everyone: list[psutil.Process] = []
    try:
        server = Server(port, psutil.Process(process.pid))
        _wait_until_it_answers(server, process, log)
        everyone = server.processes()
        yield server
    finally:
        everyone += [p for p in _children(process.pid) if p not in everyone]
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        _, left = psutil.wait_procs(everyone, timeout=20)
        for survivor in left:
            survivor.kill()
        process.wait(20)
    assert left == [], f"processes were left after SIGTERM: {left}"


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _wait_until_it_answers(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=10) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer: {log.read_text(errors='replace')[-4000:]}")
