"""One fork server for the whole session: pytest's controller starts it, xdist's workers use it."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.fork_server import fork_server
from tests.helpers.launch import QUICK_PYTHON, environment

_OPEN = pytest.StashKey[ExitStack]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OPEN] = stack = ExitStack()
    if QUICK_PYTHON not in os.environ:  # also in the environment of the workers
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ[QUICK_PYTHON] = str(stack.enter_context(fork_server(folder, environment())))
        stack.callback(os.environ.pop, QUICK_PYTHON)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_OPEN].close()
