"""With ``MOIIE_TEST_FORKS=1``: one fork server for the session."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.launch import FORKS

_OPEN = pytest.StashKey[ExitStack]()


def pytest_configure(config: pytest.Config) -> None:
    """The controller gives the server a directory; whoever first needs a process starts it."""
    config.stash[_OPEN] = stack = ExitStack()
    if os.environ.get("MOIIE_TEST_FORKS") == "1" and FORKS not in os.environ:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ[FORKS] = str(directory)  # also in the environment of xdist's workers
        stack.callback(os.environ.pop, FORKS)
        stack.callback(ForkServer(directory).stop)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_OPEN].close()
