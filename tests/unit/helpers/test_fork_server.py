"""Programs in forks end, print and die as under Python itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.launch import FORKS, ROOT, environment, fork_of, is_running, python, run

pytestmark = pytest.mark.slow  # the server imports everything

PROGRAM = """
import os, sys, time
print(sys.argv[1:], os.getcwd(), sys.path[0], __name__)
what = sys.argv[1]
if what == "number":
    sys.exit(3)
if what == "sentence":
    sys.exit("no")
if what == "error":
    raise RuntimeError("broken")
if what == "wait":
    time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One of these tests' own, where the session has none."""
    if FORKS in os.environ:
        yield
        return
    directory = tmp_path_factory.mktemp("forks")
    ForkServer(directory).own()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FORKS, str(directory))
        yield
    ForkServer(directory).stop()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return file


@pytest.mark.parametrize("what", ["nothing", "number", "sentence", "error"])
def test_ends_as_under_python(program: Path, what: str) -> None:
    fork, own = (
        run([start, str(program), what], timeout=60) for start in (python(), sys.executable)
    )
    assert (fork.code, fork.stdout) == (own.code, own.stdout)
    assert fork.stderr.splitlines()[-1:] == own.stderr.splitlines()[-1:]


def test_imports_are_done_already() -> None:
    loaded = "import sys; print('megatron.core' in sys.modules, sys.executable)"
    assert run([python(), "-c", loaded], timeout=60).stdout == f"True {python()}\n"


def test_another_environment_is_left_to_python() -> None:
    words = ["env", "OMP_NUM_THREADS=2", python(), "-c", "import sys; print(sys.executable)"]
    assert Path(run(words, timeout=60).stdout.strip()).samefile(sys.executable)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(program: Path, number: int) -> None:
    """A signal for the process that a test knows ends both."""
    words = [python(), str(program), "wait"]
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and b"wait" in process.stdout.readline()
        fork = fork_of(process)
        assert fork != process.pid
        process.send_signal(number)
        assert process.wait(10) == -number
    deadline = time.monotonic() + 10
    while is_running(fork):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_fork(program: Path) -> None:
    words = [python(), str(program), "wait"]
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        os.kill(fork_of(process), signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL


def test_a_second_start_changes_nothing() -> None:
    server = ForkServer(Path(os.environ[FORKS]))
    python()
    pid = (server.directory / "pid").read_text()
    server.start(environment())
    assert (server.directory / "pid").read_text() == pid and is_running(int(pid))


@pytest.mark.parametrize("is_killed", [False, True], ids=["stopped", "killed"])
def test_it_ends_with_its_owner(is_killed: bool, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as owner:
        (tmp_path / "owner").write_text(str(owner.pid))
        server = ForkServer(tmp_path)
        server.start(environment())
        pid = int((tmp_path / "pid").read_text())
        assert is_running(pid)
        if not is_killed:
            server.stop()
        owner.kill()
    deadline = time.monotonic() + 60  # it may still be importing
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
