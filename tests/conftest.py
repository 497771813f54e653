"""What tests of all folders share; with ``MOIIE_TEST_FORKS=1`` one fork server for the session."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.launch import FORKS

if TYPE_CHECKING:
    from moiie_megatron.mcore.parallel import ParallelContext

_OPEN = pytest.StashKey[ExitStack]()


def pytest_configure(config: pytest.Config) -> None:
    """The controller gives the server a directory; whoever first needs a process starts it.

    Background jobs of a shell script ignore SIGINT, and so would the programs that tests signal.
    """
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    config.stash[_OPEN] = stack = ExitStack()
    if os.environ.get("MOIIE_TEST_FORKS") == "1" and FORKS not in os.environ:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ[FORKS] = str(directory)  # also in the environment of xdist's workers
        stack.callback(os.environ.pop, FORKS)
        server = ForkServer(directory)
        server.own()
        stack.callback(server.stop)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_OPEN].close()


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    """One process on the CPU, as Megatron sees it."""
    import torch  # here: most tests of configurations and rules need neither

    from moiie_megatron.config.schema import ParallelConfig
    from moiie_megatron.mcore.dist_env import DistEnv
    from moiie_megatron.mcore.parallel import destroy_parallel, init_parallel

    torch.set_num_threads(1)
    yield init_parallel(ParallelConfig(), DistEnv(), device="cpu", seed=1)
    destroy_parallel()
