"""What the tests of the command lines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.shared import made_once, session_folder
from tests.helpers.tiny_run import make_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(session_folder(tmp_path_factory) / "digits", make_digits)
